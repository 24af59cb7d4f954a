"""Random access to the bytes of records in the files of a cache split.

`array_record_data_source.ArrayRecordDataSource` does the same, but asks for a record by a list of
one index. ArrayRecord then walks over all that the file holds, which takes 13 milliseconds with 1.4
million records (`python -m benchmarks.scale --try_index`). A range of one record costs the same in
any file.
"""

import bisect
import itertools
import os
import threading

from array_record.python import array_record_module

# What is read beside a record is never used: rows come in random order.
_OPTIONS, _BUFFER = "readahead_buffer_size:0", 32 << 10


class Records:
    """The records of files, in their order: len(), [row] -> bytes. For several threads.

    A file is opened when a record of it is first read. A copy for another process opens its own.

    Raises:
      RuntimeError: a file is missing or damaged, or holds another number of records.
    """

    def __init__(self, paths, counts):
        """Args: paths: of ArrayRecord files; counts: the number of records in each."""
        self._paths = [os.fspath(path) for path in paths]
        self._counts, self._ends = list(counts), list(itertools.accumulate(counts))
        self.__setstate__({})

    def __len__(self):
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row):
        if not 0 <= row < len(self):
            raise IndexError(f"record {row} of {len(self)}")
        number = bisect.bisect_right(self._ends, row)
        place = row - (self._ends[number - 1] if number else 0)
        return self._reader(number).read(place, place + 1)[0]

    def file(self, row):
        """Returns the path of the file that holds a record."""
        return self._paths[bisect.bisect_right(self._ends, row)]

    def _reader(self, number):
        if (reader := self._readers[number]) is None:
            with self._opening:
                if (reader := self._readers[number]) is None:
                    reader = array_record_module.ArrayRecordReader(
                        self._paths[number], options=_OPTIONS, file_reader_buffer_size=_BUFFER
                    )
                    self._check(number, reader.num_records())
                    self._readers[number] = reader
        return reader

    def _check(self, number, there):
        """ArrayRecord opens what is no file of its, as one without records."""
        if there != self._counts[number]:
            raise RuntimeError(
                f"{self._paths[number]} holds {there} records, expected {self._counts[number]}"
            )

    def __getstate__(self):
        return {"_paths": self._paths, "_counts": self._counts, "_ends": self._ends}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._readers, self._opening = [None] * len(self._paths), threading.Lock()
