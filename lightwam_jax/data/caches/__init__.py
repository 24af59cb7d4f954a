"""Caches: latents (read) and build_latents (made), text; resumable and journal survive a kill."""
