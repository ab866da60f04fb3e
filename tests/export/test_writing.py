"""What an export leaves on the disk."""

import os
import stat

import pytest

from ftlit.export.writing import whole_folder


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_of_new_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "deep").mkdir()
            for path in (folder / "model.safetensors", folder / "deep" / "more.bin"):
                path.write_bytes(b"x")
                path.chmod(0o600)  # as safetensors writes them
    finally:
        os.umask(before)
    for path in (tmp_path / "out" / "model.safetensors", tmp_path / "out" / "deep" / "more.bin"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
