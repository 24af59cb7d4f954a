"""Caches: latents (read) and build_latents (made), text; records (bytes); resumable, journal."""
