"""Reads the .wandb file of an offline run: LevelDB's log format (blocks of 32 KiB) with W&B's protobuf records."""

import json
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 1 << 15


def records(path):
    data = Path(path).read_bytes()
    ident, magic, _ = struct.unpack("<4sHB", data[:7])
    assert (ident, magic) == (b":W&B", 0xBEE1)
    place, parts = 7, []
    while place + 7 <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            break
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def _key(item):
    return item.key or ".".join(item.nested_key)


class Offline:
    """What an offline run holds."""

    def __init__(self, folder):
        (file,) = Path(folder).glob("run-*.wandb")
        self.config, self.history, self.summary, self.artifacts, self.exit = {}, [], {}, [], None
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                for item in record.run.config.update:
                    self.config[_key(item)] = json.loads(item.value_json)
            elif kind == "config":
                for item in record.config.update:
                    self.config[_key(item)] = json.loads(item.value_json)
            elif kind == "history":
                self.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
            elif kind == "summary":
                for item in record.summary.update:
                    self.summary[_key(item)] = json.loads(item.value_json)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "exit":
                self.exit = record.exit.exit_code

    def metrics(self):
        """`{step: {metric: number}}` of the history."""
        return {
            row["_step"]: {
                key: value
                for key, value in row.items()
                if not key.startswith(("_", "trainer/")) and isinstance(value, int | float)
            }
            for row in self.history
        }
