"""Files: whole or not there at all, and numbers that are read as they were written."""

import os
from pathlib import Path

import pytest

import files
from helpers import contents


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / 'file'
    path.write_text('much longer, and older')
    with files.atomic(path) as file:
        file.write(b'\0\xff')
        file.flush()
        assert path.read_text() == 'much longer, and older'
    assert contents(tmp_path) == {'file': b'\0\xff'}


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / 'file').write_text('old')
    with pytest.raises(error), files.atomic(tmp_path / 'file') as file:
        file.write(b'half')
        raise error
    assert contents(tmp_path) == {'file': b'old'}


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a device that is always full')
def test_a_full_disk_leaves_the_old_file_and_the_error_names_that_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    (tmp_path / f'file.{os.getpid()}.tmp').symlink_to('/dev/full')  # where half a file would be
    with pytest.raises(OSError, match=f"No space left on device: '{path}'$"):
        files.write_text(path, 'new')
    assert contents(tmp_path) == {'file': b'old'}


def test_a_table_has_a_header_empty_cells_and_six_digits_and_is_read_again(tmp_path):
    path = tmp_path / 'a.csv'
    files.write_csv(path, [{'epoch': 0, 'nats': None, 'seconds': 1 / 3},
                           {'epoch': 1234567, 'nats': 123456.789, 'seconds': 2e-9}])
    assert path.read_bytes() == b'epoch,nats,seconds\n0,,0.333333\n1234567,123457,2e-09\n'
    assert files.read_csv(path)[0] == {'epoch': '0', 'nats': '', 'seconds': '0.333333'}
