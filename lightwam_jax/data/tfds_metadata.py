"""What TFDS raises for metadata that are damaged, as one line that names the file."""

import contextlib

from google.protobuf import json_format


@contextlib.contextmanager
def naming(file, redo="copy it again"):
    """Makes a ValueError of whatever TFDS says of a metadata file, with its name and what to do."""
    try:
        yield
    except (
        json_format.Error,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OSError,
        ImportError,  # of TensorFlow, for a dtype that numpy does not know
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file} cannot be read as TFDS wrote it ({reason}); {redo}") from error
