"""The TFDS builder that writes the records of a prepared dataset, in this process or as an Apache Beam pipeline."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from sscl_jax.data.workers import Workers, pipeline_options

CASES_PER_SHARD = 64


class Cases(tfds.core.ShardBasedBuilder):
    """Writes kept cases, see `sscl_jax.data.kept`, shard by shard and in their order.

    TFDS has two kinds of builders. `GeneratorBasedBuilder` sorts all records of a split by key: in memory up to 1 GB,
    beyond that through files for which it needs TensorFlow, and in a pipeline by sending all of them through its
    shuffle. `ShardBasedBuilder` writes each shard from a generator: it needs none of that, and keeps our order.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, folder: Path, lengths: dict[str, int], kept: Iterator[Path], metadata: dict, workers: Workers):
        """Writes nothing yet.

        Args:
          folder: to write in.
          lengths: how many cases each split has.
          kept: files of all cases, in the order of the splits.
          metadata: of the dataset.
          workers: see `sscl_jax.data.workers`; those of a pipeline write the shards.
        """
        self._metadata, self._workers = metadata, workers
        self._shards: dict[str, list] = {}
        first = 0
        for split, length in lengths.items():
            starts = range(0, length, CASES_PER_SHARD)
            parts: list[Iterable[Path]] = [islice(kept, min(CASES_PER_SHARD, length - start)) for start in starts]
            if not isinstance(workers, int):  # to workers elsewhere no iterator can be sent
                parts = list(map(list, parts))
            self._shards[split] = [partial(_examples, first + n, part) for n, part in zip(starts, parts, strict=True)]
            first += length
        super().__init__(data_dir=folder, file_format="array_record")

    def prepare(self) -> Path:
        """Writes the records; returns the folder that holds them."""
        beam = {}
        if not isinstance(self._workers, int):
            options = pipeline_options(self._workers)
            # TFDS takes a pipeline where it is told a runner.
            beam = {"beam_options": options, "beam_runner": options.get_all_options()["runner"] or "DirectRunner"}
        self.download_and_prepare(download_config=tfds.download.DownloadConfig(**beam))
        return Path(self.data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            description="Medical images, preprocessed for sscl_jax; one record is one case.",
            features=features.FeaturesDict(
                {
                    "index": features.Scalar(np.int64),
                    "case_id": features.Text(),
                    "patient_id": features.Text(),
                    "source": features.Text(),
                    # ArrayRecord compresses each record, so plain bytes do for the images. Labels need
                    # zlib: TFDS cannot read back an empty tensor that is stored as bytes.
                    "image": features.Tensor(shape=(None,) * 4, dtype=np.float32, encoding="bytes"),
                    "label": features.Tensor(shape=(None,) * 3, dtype=np.uint8, encoding="zlib"),
                    "native_label": features.Tensor(shape=(None,) * 3, dtype=np.uint8, encoding="zlib"),
                    # As bytes, because a record's plain numbers are float32.
                    "native_affine": features.Tensor(shape=(4, 4), dtype=np.float64, encoding="bytes"),
                    "native_shape": features.Tensor(shape=(3,), dtype=np.int64),
                    "spacing": features.Tensor(shape=(3,), dtype=np.float64, encoding="bytes"),
                }
            ),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,  # the order of the records is meant,
        )

    def _log_download_bytes(self) -> None:
        """Says nothing: nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Says nothing: where it lies now it does not stay."""

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        # A pipeline for each split: TFDS puts all of them into one, which it runs again with every split.
        infos = []
        for split in self._shards:
            self._split = split
            super()._download_and_prepare(dl_manager, download_config)
            infos += self.info.splits.values()
            for left in Path(self.data_dir).glob("*.shard_infos.json"):  # by the pipeline
                left.unlink()
        self.info.set_splits(tfds.core.splits.SplitDict(infos))

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list]:
        return {self._split: self._shards[self._split]}

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _Writer(self.info.file_format)


class _Writer(tfds.core.ExampleWriter):
    """Writes the fields of a record by name: as TFDS hands them over, their order varies between processes."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        records = ((key, tf_example_pb2.Example.FromString(record)) for key, record in examples)
        return super().write(path, ((key, record.SerializeToString(deterministic=True)) for key, record in records))


def _examples(first: int, kept: Iterable[Path]) -> Iterator[tuple[int, Mapping]]:
    """Keys and examples of the cases in the files `kept`, numbered from `first`."""
    for index, path in enumerate(kept, first):
        yield index, _Example(index, path)


class _Example(Mapping):
    """The record of a kept case. Fields are read when they are asked for, since TFDS holds all examples of a shard."""

    def __init__(self, index: int, path: Path):
        self.index, self.path = index, path

    def __getitem__(self, name: str) -> Any:
        if name == "index":
            return self.index
        with np.load(self.path) as file:
            value = file[name]
        return value if value.ndim else value.item()

    def __iter__(self) -> Iterator[str]:
        with np.load(self.path) as file:
            return iter(["index", *file])

    def __len__(self) -> int:
        return sum(1 for _ in self)
