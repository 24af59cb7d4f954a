"""Formats of recordings: lerobot, hdf5 and rlds read, lerobot_write writes.

`data.episodes.read` imports the module that config.data.source names. lerobot_meta reads LeRobot's
meta/, lerobot_layouts and lerobot_stats are for writing it. Shared: stored (an episode), keys
(config.data.fields of HDF5 and RLDS), video.
"""
