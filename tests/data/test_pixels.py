"""Pixels lie where their boxes are, and are as bright as they were, whatever convention the files of a dataset follow."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pixel_files import deep_png, deep_tiff, oriented, turned
from small_sets import encode, write_coco

from retina_jax.config import Config, DataConfig
from retina_jax.config_io import override
from retina_jax.data.datasets import open_source, open_sources, read_coco
from retina_jax.data.decoding import image_of, is_one_colour, is_plain_jpeg, open_image, read_header, to_rgb
from retina_jax.data.pipeline import eval_batches, train_batches
from retina_jax.data.sixteen_bits import Values, _warn_once, find_range, to_eight_bits
from retina_jax.data.source import BadImage, Decoding, Source
from retina_jax.data.survey import Survey, Votes, decoding_of_files, survey_files, with_decoding
from retina_jax.data_check.check import check_data, decide_decoding, survey_split
from retina_jax.data_check.findings import Finding
from retina_jax.data_check.split import fault_of, missing_part, read_split

RED = np.array([230, 30, 30])


def square(width: int, height: int) -> np.ndarray:
    """Draws a grey image with a red square near one corner, which every rotation moves."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[2:10, 4:12] = RED
    return pixels


def is_red(pixels: np.ndarray) -> np.ndarray:
    return np.abs(pixels.astype(int) - RED).max(axis=2) < 60


def write_squares(
    folder: Path, drawn: list[tuple[int, str, str, tuple[int, int]]], unsized: Sequence[int] = ()
) -> tuple[Path, Path]:
    """A dataset; of each image the orientation, `stored` or `turned` annotations, the format and the stored size.
    The annotations lack the sizes of the images `unsized`."""
    images, annotations, files = [], [], {}
    for i, (orientation, convention, kind, size) in enumerate(drawn):
        stored = square(*size)
        annotated = turned(stored, orientation) if convention == "turned" else stored
        rows, columns = np.nonzero(is_red(annotated))
        box = [int(columns.min()), int(rows.min()), 8, 8]
        name, (height, width) = f"{i}.{kind.lower()}", annotated.shape[:2]
        files[name] = oriented(stored, orientation, kind)
        size_of_image = {} if i in unsized else {"width": width, "height": height}
        images.append({"id": i + 1, "file_name": name, **size_of_image})
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "red"}]}
    folder.mkdir(exist_ok=True)
    path, image_folder = write_coco(folder, content)
    for name, encoded in files.items():
        (image_folder / name).write_bytes(encoded)
    return path, image_folder


def opened(pair: tuple[Path, Path], choice: str = "auto") -> tuple[list[bool], list[bool]]:
    """Returns for each image whether its square is in its box, and for each reported line whether it is a warning."""
    source = read_coco(*pair)
    sizes = [(record.width, record.height) for record in source.records]
    names = [record.file_name for record in source.records]
    survey = survey_files(names, [pair[1] / name for name in names], sizes)
    decoding, lines = survey.decide(DataConfig(orientation=choice))
    right = []
    for record, size in zip(source.records, sizes, strict=True):
        encoded = (pair[1] / record.file_name).read_bytes()
        red = is_red(to_rgb(encoded, decoding, expected_size=size))
        x1, y1, x2, y2 = record.boxes_xyxy[0].astype(int)
        right.append(bool(red[y1:y2, x1:x2].mean() > 0.8))
        if encoded[:2] == b"\xff\xd8" and is_plain_jpeg(encoded, decoding, expected_size=size):
            with Image.open(io.BytesIO(encoded)) as as_stored:
                assert np.array_equal(is_red(np.asarray(as_stored)), red), "TensorFlow would decode other pixels"
    return right, [in_doubt for _, in_doubt in lines]


@st.composite
def datasets(draw: st.DrawFn) -> list[tuple[int, str, str, tuple[int, int]]]:
    """Draws images of one convention, or of both."""
    conventions = draw(st.sampled_from([["stored"], ["turned"], ["stored", "turned"]]))
    image = st.tuples(
        st.integers(1, 8),
        st.sampled_from(conventions),
        st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP"]),
        st.sampled_from([(32, 24), (24, 32), (24, 24)]),
    )
    return draw(st.lists(image, min_size=1, max_size=5))


def shows(orientation: int, size: tuple[int, int]) -> bool:
    """Returns whether the annotated size shows the convention."""
    return orientation >= 5 and size[0] != size[1]


@settings(deadline=None, max_examples=80)
@given(datasets())
def test_squares_are_in_their_boxes_or_the_ambiguity_is_reported(drawn: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        right, lines = opened(write_squares(Path(folder), drawn))
    affected = [(convention, shows(o, size)) for o, convention, _, size in drawn if o > 1]
    showing = {convention for convention, shown in affected if shown}
    # Where images of both conventions are mixed and all that show theirs have the same one, nothing in the files shows it:
    # the line that names the others is all there is.
    mixed_unseen = len({convention for convention, _ in affected}) == 2 and len(showing) == 1
    assert all(right) or any(lines) or (mixed_unseen and lines)
    # Those whose own size shows it are right whatever the others say.
    assert all(fine for fine, (o, _, _, size) in zip(right, drawn, strict=True) if o == 1 or shows(o, size))
    assert any(lines) == (len(showing) == 2 or (bool(affected) and not showing))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.sampled_from(["stored", "turned"]))
def test_the_option_decides_if_no_image_shows_the_convention(orientations: list[int], convention: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pair = write_squares(Path(folder), [(o, convention, "JPEG", (24, 24)) for o in orientations])
        assert opened(pair, convention) == ([True] * len(orientations), [False] * any(o > 1 for o in orientations))


@pytest.mark.parametrize("bits", [8, 16])
def test_exif_behind_the_pixels_of_a_png_is_read(bits: int) -> None:
    encoded = oriented(square(32, 24), 6, "PNG")
    at = encoded.index(b"eXIf") - 4
    length = int.from_bytes(encoded[at : at + 4]) + 12
    pixels = encoded[:at] + encoded[at + length :] if bits == 8 else deep_png(square(32, 24).astype(np.uint16) << 8)
    late = pixels[:-12] + encoded[at : at + length] + pixels[-12:]
    assert read_header(open_image(late)).orientation == 6
    assert np.array_equal(to_rgb(late), turned(square(32, 24), 6))


def split_paths(**pairs: tuple[Path, Path]) -> dict[str, str]:
    """Returns the fields of a DataConfig for `train` and `val`."""
    return {
        f"{split}_{what}": str(path)
        for split, pair in pairs.items()
        for what, path in zip(("annotations", "images"), pair, strict=True)
    }


def squares_are_in_boxes(source: Source) -> bool:
    corners = [record.boxes_xyxy[0].astype(int) for record in source.records]
    shares = [is_red(image_of(source, i))[y1:y2, x1:x2].mean() for i, (x1, y1, x2, y2) in enumerate(corners)]
    return min(shares) > 0.8


@pytest.mark.parametrize("convention", ["stored", "turned"])
def test_images_without_a_size_follow_those_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convention: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where sizes are cached
    drawn = [(orientation, convention, "JPEG", (32, 24)) for orientation in (6, 6, 8, 3)]
    some = write_squares(tmp_path / "some", drawn, unsized=(0, 2, 3))
    source = with_decoding(read_coco(*some), DataConfig())
    assert source.annotated_orientation == source.decoding.orientation == convention and squares_are_in_boxes(source)
    decoding, _, found = checked(some)
    assert decoding == source.decoding and [finding.kind for finding in found] == ["decoding"]
    none = write_squares(tmp_path / "none", drawn, unsized=range(4))
    assert with_decoding(read_coco(*none), DataConfig()).annotated_orientation == "open"
    assert [finding.kind for finding in checked(none)[2]] == ["pixels"]
    for pairs in ({"train": some, "val": none}, {"train": none, "val": some}):
        train, val, config = open_sources(Config(data=DataConfig(**split_paths(**pairs))))
        assert squares_are_in_boxes(train) and squares_are_in_boxes(val)
        assert squares_are_in_boxes(open_source(config.data, "val"))  # as evaluation of the run opens it
        check = check_data(Config(), pairs)
        assert [split.images[0][2:] for split in check.splits] == [
            (record.width, record.height) for record in (train.records[0], val.records[0])
        ]


def test_the_size_of_an_image_wins_over_the_orientation_of_the_run(tmp_path: Path) -> None:
    pair = write_squares(tmp_path, [(orientation, "turned", "JPEG", (32, 24)) for orientation in (6, 3)])
    data = DataConfig(undecided_orientation="stored")
    source = with_decoding(read_coco(*pair, data=DataConfig(undecided_orientation="stored")), data)
    assert source.decoding.orientation == "turned" and squares_are_in_boxes(source)


def photograph(channels: int) -> np.ndarray:
    """Returns smooth values from 0 to 255."""
    ramp = np.linspace(0, 255, 40)[:, None, None] * np.linspace(0.2, 1, 30)[None, :, None]
    return (ramp * np.linspace(1, 0.6, channels)).round().astype(np.uint8)


WRITERS = {
    "PNG, grey": (1, deep_png),
    "PNG, RGB": (3, deep_png),
    "TIFF, grey": (1, deep_tiff),
    "TIFF, grey, compressed": (1, lambda values: deep_tiff(values, ">", compressed=True)),
    "TIFF, RGB": (3, deep_tiff),
    "TIFF, RGB, high bytes first": (3, lambda values: deep_tiff(values, ">")),
    "TIFF, RGB, compressed": (3, lambda values: deep_tiff(values, ">", compressed=True)),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_sixteen_bit_files_are_as_bright_as_the_originals(tmp_path: Path, bits: int, kind: str) -> None:
    channels, write = WRITERS[kind]
    original = photograph(channels)
    path = tmp_path / "image"
    path.write_bytes(write(original.astype(np.uint16) << (bits - 8)))
    decoding, _ = survey_files(["image"], [path], [(30, 40)]).decide(DataConfig())
    assert decoding.bits == bits
    decoded = to_rgb(path.read_bytes(), decoding, expected_size=(30, 40))
    assert np.array_equal(decoded, np.broadcast_to(original, decoded.shape))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_tiffs_are_turned_and_not(orientation: int, channels: int, compressed: bool) -> None:
    values = photograph(channels)
    encoded = deep_tiff(values.astype(np.uint16), compressed=compressed, orientation=orientation)
    for convention, expected in (("stored", values), ("turned", turned(values, orientation))):
        decoded = to_rgb(encoded, Decoding(convention, 8), expected_size=expected.shape[1::-1])
        assert np.array_equal(decoded, np.broadcast_to(expected, decoded.shape))


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("opaque", [255, 65535])
def test_sixteen_bit_transparency(channels: int, opaque: int) -> None:
    values = np.full((4, 6, channels), 200, np.uint16)
    values[..., -1] = opaque
    values[:, :3, -1] = 0
    decoded = to_rgb(deep_png(values), Decoding(bits=8))
    assert (decoded[:, :3] == 255).all() and (decoded[:, 3:] == 200).all()


def test_outliers_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.full((60, 60, 1), 3000, np.uint16)
    values[0, 0] = 60000
    (tmp_path / "hot.png").write_bytes(deep_png(values))
    survey = survey_files(["hot.png"], [tmp_path / "hot.png"], [(60, 60)])
    decoding, lines = survey.decide(DataConfig())
    assert decoding.bits == 16 and any(in_doubt and "data.bits 12" in line for line, in_doubt in lines)
    decoding, lines = survey.decide(DataConfig(bits=12))
    assert decoding.bits == 12 and any(in_doubt for _, in_doubt in lines)
    _warn_once.cache_clear()
    for _ in range(2):
        image = to_rgb((tmp_path / "hot.png").read_bytes(), decoding)
        assert (image[0, 0] == 255).all() and (image[1, 1] == 3000 >> 4).all()
    assert len(caplog.records) == 1


def lines_of(*images: np.ndarray, **changes: int) -> tuple[int | None, list[str]]:
    """Returns the bits that 16-bit images of these values are decoded with, and the warnings."""
    decoding, lines = Survey(Votes(), find_range([Values.of(image) for image in images])).decide(DataConfig(**changes))
    return decoding.bits, [line for line, in_doubt in lines if in_doubt]


def deep(bits: int, shape: tuple[int, int] = (60, 60)) -> np.ndarray:
    """Returns values spread evenly over a range."""
    return np.linspace(0, 2**bits - 1, shape[0] * shape[1]).astype(np.uint16).reshape(*shape, 1)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_saturated_pixels_do_not_widen_the_range(bits: int) -> None:
    few, many = deep(bits), deep(bits)
    few[0, :20] = 65535
    many[:5] = 65535
    found, warnings = lines_of(few)
    assert found == bits and len(warnings) == 1 and "65535" in warnings[0]
    found, warnings = lines_of(many)
    assert found == 16 and (bits == 14 or f"data.bits {bits}" in warnings[0])
    assert to_eight_bits(few.copy(), bits).getpixel((0, 0)) == 255


def test_ranges_that_differ_between_images_are_reported() -> None:
    assert lines_of(*[deep(12)] * 6) == (12, [])
    found, warnings = lines_of(*[deep(8)] * 3, *[deep(12)] * 3)
    assert found == 12 and len(warnings) == 1 and "3 of 6" in warnings[0]
    assert lines_of(deep(10), deep(12)) == (12, [])
    assert len(lines_of(deep(8), deep(12), bits=12)[1]) == 1


def test_images_within_the_range_of_training_are_no_warning() -> None:
    assert lines_of(deep(12) // 5, bits=12) == (12, [])
    for image in (deep(8), deep(14)):
        assert len(lines_of(image, bits=12)[1]) == 1


@pytest.mark.parametrize("tags", [{"planes": 2}, {"photometric": 0}])
def test_sixteen_bit_tiffs_of_other_layouts_are_refused(tags: dict) -> None:
    values = np.zeros((4, 6, 3 if "planes" in tags else 1), np.uint16)
    with pytest.raises(BadImage, match="16-bit TIFF"):
        to_rgb(deep_tiff(values, **tags))


def write_deep(folder: Path, bits: int) -> tuple[Path, Path]:
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in range(4):
        values = np.full((24, 32, 1), 60, np.uint16)
        values[2:10, 4 + i : 12 + i] = 220
        (folder / f"images/{i}.png").write_bytes(deep_png(values << (bits - 8)))
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": 32, "height": 24})
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [4 + i, 2, 8, 8]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "bright"}]}
    return write_coco(folder, content)


def checked(pair: tuple[Path, Path]) -> tuple[Decoding, Config, list[Finding]]:
    split = read_split("train", *pair, "keep")
    return decide_decoding(split, survey_split(split), Config())


def test_training_evaluation_and_the_check_decode_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training data are 8-bit values in 16-bit files; evaluation data of 12 bits are read in the range of the training
    data."""
    train, val = write_deep(tmp_path / "train", 8), write_deep(tmp_path / "val", 12)
    data = DataConfig(**split_paths(train=train, val=train), short_side=24, long_side=32, batch_size=4, flip=False)
    source, val_source, config = open_sources(Config(data=data))
    assert config.data.bits == 8
    for batches in (train_batches(source, config.data, seed=0), eval_batches(val_source, config.data, batch_size=4)):
        batch = next(batches)
        for image, index in zip(batch.images, batch.indices, strict=True):
            assert np.array_equal(image[:24, :32], image_of(source, int(index)))
            assert image[0, 0].tolist() == [60] * 3 and image[4, 8].tolist() == [220] * 3
    decoding, resolved, _ = checked(train)
    assert decoding == source.decoding and resolved.data.bits == 8
    capsys.readouterr()
    _, other, _ = open_sources(
        override(Config(data=data), dict(zip(["data.val_annotations", "data.val_images"], map(str, val), strict=True)))
    )
    assert other.decoding.bits == 8 and "warning" in capsys.readouterr().out
    assert (image_of(other, 0) == 255).all()  # which is why it is warned of


def test_convention_of_the_dataset_reaches_training_evaluation_and_the_check(tmp_path: Path) -> None:
    sizes = [(6, (32, 24)), (8, (32, 24)), (3, (32, 24)), (6, (24, 24)), (1, (32, 24))]
    pair = write_squares(tmp_path, [(orientation, "stored", "JPEG", size) for orientation, size in sizes])
    data = DataConfig(
        **split_paths(train=pair, val=pair), short_side=24, long_side=32, batch_size=5, flip=False, buckets=1
    )
    source, val_source, config = open_sources(Config(data=data))
    for batches in (train_batches(source, config.data, seed=0), eval_batches(val_source, config.data, batch_size=5)):
        batch = next(batches)
        for image in batch.images:
            assert is_red(image)[2:10, 4:12].mean() > 0.8
    decoding, _, found = checked(pair)
    assert decoding == source.decoding == Decoding("stored") and [finding.kind for finding in found] == ["decoding"]


def test_files_without_annotations_are_turned_as_viewers_show_them(tmp_path: Path) -> None:
    """In prediction the range is that of training, or that of the files if training had no 16-bit images."""
    (tmp_path / "turned.jpg").write_bytes(oriented(square(32, 24), 6, "JPEG"))
    (tmp_path / "deep.png").write_bytes(deep_png(np.full((4, 4, 1), 1000, np.uint16)))
    files = [tmp_path / "turned.jpg", tmp_path / "deep.png", tmp_path / "missing.png"]
    assert decoding_of_files(files, DataConfig()) == Decoding("turned", 10)
    assert decoding_of_files(files[:1], DataConfig(orientation="stored")) == Decoding("stored")
    assert decoding_of_files(files, DataConfig(bits=12)) == Decoding("turned", 12)


def test_boxes_of_tensorflow_datasets_are_on_stored_pixels(tmp_path: Path) -> None:
    source = read_coco(*write_deep(tmp_path / "deep", 10))
    assert with_decoding(source, DataConfig(source="tfds")).decoding == Decoding("stored", 10)
    assert with_decoding(source, DataConfig(source="tfds", orientation="turned")).decoding == Decoding("turned", 10)


def test_one_colour_is_what_hardly_any_pixel_differs_from() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((300, 400, 3), (90, 100, 255), np.uint8)
    noisy = flat - rng.integers(0, 3, flat.shape, np.uint8)
    spot = flat.copy()
    spot[10:40, 10:40] = 0  # 0.75 %
    assert is_one_colour(flat) and is_one_colour(noisy) and is_one_colour(noisy.astype(np.float32))
    assert not is_one_colour(spot) and not is_one_colour(rng.integers(0, 256, flat.shape, np.uint8))


def test_an_image_with_something_in_a_box_does_not_have_one_colour() -> None:
    image = np.full((1000, 1200, 3), 90, np.uint8)
    image[501:511, 601:611] = 200  # between the pixels of the grid
    box = np.array([[600, 500, 612, 512]], np.float32)
    assert is_one_colour(image) and not is_one_colour(image, box) and is_one_colour(image, box + 100)
    assert not is_one_colour(image, np.array([[601, 501, 611, 511]], np.float32))
    encoded = encode(image, "PNG")
    assert fault_of(encoded, (1200, 1000), Decoding(), box) is None
    assert fault_of(encoded, (1200, 1000), Decoding())[0] == "one_colour"


def test_training_counts_images_of_one_colour_once(tmp_path: Path) -> None:
    pair = write_squares(tmp_path, [(1, "stored", "JPEG", (32, 24))] * 4)
    (pair[1] / "2.jpeg").write_bytes(encode(np.zeros((24, 32, 3), np.uint8)))
    source = read_coco(*pair)
    batches = train_batches(source, DataConfig(short_side=24, long_side=32, batch_size=4), seed=0)
    for _ in range(3):
        next(batches)
    assert batches.one_colour == [source.where(2)]


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"progressive": True}])
def test_jpegs_that_lack_their_middle_are_found(options: dict) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((160, 120), Image.Resampling.BICUBIC)
    thumbnail, exif = encode(square(32, 24)), Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90, exif=exif, comment=thumbnail, **options)
    encoded = stream.getvalue()
    assert missing_part(encoded) == ""
    start = encoded.rindex(b"\xff\xda") + 14 if "progressive" in options else encoded.index(b"\xff\xda", 1500) + 14
    size = len(encoded) - start
    cut = encoded[: start + size // 4] + encoded[start + size // 2 :]
    assert to_rgb(cut).shape == (160, 120, 3), "the decoder takes it"
    assert missing_part(cut)
