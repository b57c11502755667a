"""Records of files in a bucket are those of the same files on a disk."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from bucket_servers import upload
from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.sources.files import open_file
from jaxmoo.data.sources.reading import read_examples
from jaxmoo.data.sources.source import open_source
from jaxmoo.errors import DataError

ROWS = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.json").write_text(json.dumps(ROWS))
    (folder / "c.csv").write_text(
        "prompt,completion\n" + "".join(f"{n}?,{n}!\n" for n in range(500))
    )
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(LINES))
    with pa.output_stream(str(folder / "e.jsonl.zst"), compression="zstd") as stream:
        stream.write(LINES)
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), folder / "f.parquet", row_group_size=99)
    return folder


def test_every_kind_of_file_is_read_and_found_again(disk, s3_bucket):
    upload(disk, s3_bucket)
    for file in sorted(disk.iterdir()):
        here, there = open_file(file), open_file(s3_bucket / file.name)
        first = [[next(records)[1] for _ in range(300)] for records in (here, there)]
        assert first[0] == first[1] == ROWS[:300], file.name
        there.seek(here.position())
        assert [record for _, record in there] == ROWS[300:], file.name


@pytest.mark.parametrize("source", ["{language}.jsonl", "x/{language}/{language}.jsonl", ""])
def test_the_files_of_languages_are_found(s3_bucket, source):
    for name in ("en", "de"):
        (s3_bucket / "x" / name / f"{name}.jsonl").write_bytes(LINES)
        (s3_bucket / f"{name}.jsonl").write_bytes(LINES)
    data = DataConfig(source=f"{s3_bucket}/{source}")
    assert len(read_examples(data, ["en", "de"]).languages["de"].examples) == 500
    with pytest.raises(DataError, match=r"has no language 'fr'\. Available: de, en"):
        open_source(data).open("fr")


def test_a_source_that_is_not_there_is_said_so(s3_bucket):
    with pytest.raises(DataError, match=rf"No file or directory '{s3_bucket}/nothing.jsonl'"):
        open_source(DataConfig(source=f"{s3_bucket}/nothing.jsonl"))
