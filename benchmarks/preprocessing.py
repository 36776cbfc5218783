"""How many whole examples become token ids, crops and pooling indices per second, beside transformers' own processor.

    python benchmarks/preprocessing.py [--seconds 4]

From encoded files and a question to the model's input.  Ours is `Preprocessor`, theirs is their chat template and
`Molmo2Processor` behind its own readers, the fastest of them (images: Pillow or torchvision; videos: PyAV).  Ids, crops
and pooling are checked to be equal.  Times are taken as transformers takes them, so that both see the same frames.
Every process has one thread and one core: first one process, then two at once.  The last line is the geometric mean of
ours over transformers' on two cores.  The parts alone: image_, video_ and text_ benchmarks beside this file.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.video_utils import load_video

from molmo2core.annotations import MediaKind, QuestionAnswer
from molmo2core.checkpoints.processor_files import write_processor_files
from molmo2core.examples import Example, Media
from molmo2core.image_decoding import decode_image
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.special_tokens import load_tokenizer
from molmo2core.testing.pictures import grown_photograph, photographs
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.testing.video_files import encode_video
from molmo2core.video_file import open_video

QUESTION = "What colour is the third cup from the left, and is anything standing on the plate behind it?"
GEOMETRY = VisualGeometry()
CONFIG = PreprocessingConfig(frame_sampling="as_native_processor")
Work = Callable[[], Any]


def files_of_examples() -> dict[str, list[bytes]]:
    """One photograph, a large one, three in a set, and ten seconds of 720p."""
    temple, *others = (photographs()[name] for name in ("temple", "flower", "portrait"))
    picture = decode_image(grown_photograph(temple, 1920, 1080))
    frames = [picture[n : n + 720, 2 * n : 2 * n + 1280] for n in range(300)]
    options = {"preset": "veryfast", "g": "60"}
    return {
        "image, 640 x 427": [temple],
        "image, 1920 x 1080": [grown_photograph(temple, 1920, 1080)],
        "images, three": [temple, *others],
        "video, 10 s of 720p": [encode_video(frames, options=options)],
    }


def our_work(name: str, files: list[bytes], folder: Path) -> Work:
    """An example to its tensors."""
    kind = cast(MediaKind, name.partition(",")[0])
    media = Media(kind=kind, files=tuple(files))
    if kind == "video":
        with open_video(files[0]) as video:
            index = video.index
        media = Media(kind=kind, files=tuple(files), duration_seconds=index.duration_seconds, fps=float(index.fps))
    asked = QuestionAnswer(task="image_qa", question=QUESTION, answer="blue", style="user_qa")
    example = Example(uid="u", dataset="d", split="test", media=media, annotations=(asked,))
    preprocessor = Preprocessor(
        geometry=GEOMETRY, config=CONFIG, tokenizer=load_tokenizer(folder), weighting="none", seed=0
    )
    return lambda: preprocessor.tokenize_prompt(example, 0)


def native_works(name: str, files: list[bytes], folder: Path) -> list[Work]:
    """The same with transformers, in each way that it reads files."""
    processor = Molmo2Processor.from_pretrained(folder)
    kind, paths = name.partition(",")[0].removesuffix("s"), []
    for number, data in enumerate(files):
        paths.append(str(folder / f"{name.replace(' ', '')}-{os.getpid()}-{number}"))
        Path(paths[-1]).write_bytes(data)
    messages = [{"role": "user", "content": [*({"type": kind} for _ in files), {"type": "text", "text": QUESTION}]}]

    def text() -> str:
        return cast(str, processor.apply_chat_template(messages, add_generation_prompt=True))

    def read_by_pillow() -> Any:
        images = [load_image(Image.open(io.BytesIO(data))) for data in files]
        return processor(images=images, text=text(), return_tensors="pt")

    def read_by_pyav() -> Any:
        sample = processor.video_processor.sample_frames
        frames, metadata = load_video(paths[0], backend="pyav", sample_indices_fn=sample)
        return processor(
            videos=[frames], video_metadata=[metadata], do_sample_frames=False, text=text(), return_tensors="pt"
        )

    if kind == "video":
        return [read_by_pyav]
    return [read_by_pillow, lambda: processor(images=paths, text=text(), return_tensors="pt")]


def check_equal(ours: Any, theirs: Any) -> None:
    """Raise if the two sides differ in an id, a byte or an index."""
    suffix = "_videos" if "pixel_values_videos" in theirs else ""
    pooling = theirs["video_token_pooling" if suffix else "image_token_pooling"].numpy()
    np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"][0].numpy())
    np.testing.assert_array_equal(ours.crops, np.rint((theirs[f"pixel_values{suffix}"].numpy() + 1) * 127.5))
    np.testing.assert_array_equal(ours.pooling[:, : pooling.shape[1]], pooling)


def rates(name: str, files: list[bytes], folder: str, seconds: float, core: int) -> tuple[float, float]:
    """Examples per second of one process, ours and transformers' fastest way; rounds take turns."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    works = [our_work(name, files, Path(folder)), *native_works(name, files, Path(folder))]
    check_equal(*(work() for work in works[:2]))
    spent: list[list[float]] = [[] for _ in works]
    while sum(itertools.chain(*spent)) < seconds * len(works) or len(spent[-1]) < 2:
        for work, times in zip(works, spent, strict=True):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    ours, *theirs = (1 / statistics.median(times) for times in spent)
    return ours, max(theirs)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options = parser.parse_args()
    print(f"{'examples/s':22}{'one core':>10}{'native':>9}{'ratio':>7}{'two cores':>11}{'native':>9}{'ratio':>7}")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tiny_tokenizer().backend, Path(folder, "tokenizer"))
        write_processor_files(Path(folder), Path(folder, "tokenizer"), GEOMETRY, CONFIG)
        for name, files in files_of_examples().items():
            line = f"{name:22}"
            for processes, width in ((1, 10), (2, 11)):
                jobs = [(name, files, folder, options.seconds, core) for core in range(processes)]
                with multiprocessing.get_context("spawn").Pool(processes) as pool:
                    ours, native = (sum(found) for found in zip(*pool.starmap(rates, jobs), strict=True))
                line += f"{ours:>{width}.2f}{native:>9.2f}{ours / native:>7.2f}"
            ratios.append(ours / native)
            print(line, flush=True)
    print(f"ratio {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
