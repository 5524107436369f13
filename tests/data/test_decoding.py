"""Image files of every kind become the RGB pixels that a person sees."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_sets import encode

from retina_jax.data.decoding import MAX_PIXELS, TURNS, is_plain_jpeg, to_rgb
from retina_jax.data.source import BadImage

rng = np.random.default_rng(0)
WIDE = np.zeros((20, 30, 3), np.uint8)
WIDE[:10, :15], WIDE[:10, 15:], WIDE[10:, :15], WIDE[10:, 15:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def oriented(orientation: int, kind: str = "JPEG") -> bytes:
    """Returns a file whose pixels, rotated by its EXIF orientation, are WIDE."""
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    image = Image.fromarray(WIDE)
    if orientation in TURNS:
        image = image.transpose(undo.get(orientation, TURNS[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    return saved(image, kind, exif=exif, **options)


def test_lossless_formats_are_exact() -> None:
    pixels = rng.integers(0, 256, (7, 9, 3), np.uint8)
    for kind in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(to_rgb(encode(pixels, kind)), pixels)
    assert np.array_equal(to_rgb(encode(pixels, "WEBP", lossless=True)), pixels)


def test_plain_jpeg_is_the_same_from_tensorflow() -> None:
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((173, 131), Image.BICUBIC))
    for pixels in (smooth, smooth[..., 0]):
        for options in ({"quality": 80}, {"quality": 80, "progressive": True}, {"quality": 95, "subsampling": 0}):
            encoded = saved(Image.fromarray(pixels), "JPEG", **options)
            assert is_plain_jpeg(encoded)
            decoded = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE").numpy()
            assert np.array_equal(to_rgb(encoded), decoded)


def test_grey_becomes_equal_channels() -> None:
    grey = rng.integers(0, 256, (5, 6), np.uint8)
    assert np.array_equal(to_rgb(encode(grey, "PNG")), np.repeat(grey[..., None], 3, 2))
    one_bit = Image.fromarray(grey > 127)
    assert np.array_equal(to_rgb(saved(one_bit, "PNG")), np.repeat((grey > 127)[..., None] * np.uint8(255), 3, 2))


def test_sixteen_bits_keep_the_upper_eight() -> None:
    deep = rng.integers(0, 65536, (5, 6), np.uint16)
    for kind in ("PNG", "TIFF"):
        encoded = saved(Image.fromarray(deep), kind)
        assert np.array_equal(to_rgb(encoded), np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2))


def test_transparency_shows_white() -> None:
    pixels = np.zeros((4, 3, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, np.array([0, 51, 128, 255])[:, None]
    shares = pixels[:, 0, 3:] / 255
    expected = shares * [200, 0, 0] + (1 - shares) * 255
    for kind in ("PNG", "TIFF"):
        assert np.abs(to_rgb(encode(pixels, kind))[:, 0] - expected).max() <= 1
    grey_alpha = Image.fromarray(pixels).convert("LA")
    clear = to_rgb(saved(grey_alpha, "PNG"))[:, 0]
    assert (clear[0] == 255).all() and (clear[3] == np.asarray(grey_alpha)[3, 0, 0]).all()


def test_palette_and_its_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    assert to_rgb(saved(palette, "PNG")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert to_rgb(saved(palette, "GIF")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert to_rgb(saved(palette, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    keyed = Image.new("RGB", (1, 1), (1, 2, 3))
    assert to_rgb(saved(keyed, "PNG", transparency=(1, 2, 3))).tolist() == [[[255, 255, 255]]]


def test_first_frame_of_several() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    encoded = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (to_rgb(encoded) == [255, 0, 0]).all()


def test_cmyk_jpeg_has_the_colours_of_its_inks() -> None:
    # PIL writes CMYK as Photoshop does: inverted, with Adobe's marker.
    for inks, rgb in (((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))):
        encoded = saved(Image.new("CMYK", (16, 16), inks), "JPEG", quality=95)
        assert not is_plain_jpeg(encoded)
        assert np.abs(to_rgb(encoded).astype(int) - rgb).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_if_annotations_agree(orientation: int, kind: str) -> None:
    encoded = oriented(orientation, kind)
    for expected_size in (None, (30, 20)):
        upright = to_rgb(encoded, expected_size=expected_size).astype(int)
        assert upright.shape == WIDE.shape
        inner = np.s_[3:-3:14, 3:-3:20]
        assert np.abs(upright[inner] - WIDE[inner]).max() < 40
    if kind == "JPEG":
        assert is_plain_jpeg(encoded, expected_size=(30, 20)) == (orientation == 1)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_orientation_is_not_applied_if_boxes_are_on_the_stored_image(orientation: int) -> None:
    encoded = oriented(orientation)
    assert to_rgb(encoded, expected_size=(20, 30)).shape == (30, 20, 3)
    assert is_plain_jpeg(encoded, expected_size=(20, 30))
    with Image.open(io.BytesIO(encoded)) as stored:
        assert np.array_equal(to_rgb(encoded, expected_size=(20, 30)), np.asarray(stored))


def test_the_error_for_another_size_names_both_sizes() -> None:
    for decode in (to_rgb, is_plain_jpeg):
        with pytest.raises(BadImage, match="is 30x20 pixels, but 31x20 in the annotations"):
            decode(encode(WIDE), expected_size=(31, 20))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_undefined_orientation_is_ignored(orientation: int) -> None:
    encoded = oriented(orientation)
    assert is_plain_jpeg(encoded) and to_rgb(encoded).shape == WIDE.shape


def test_broken_exif_is_ignored() -> None:
    encoded = saved(Image.fromarray(WIDE), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert to_rgb(encoded).shape == WIDE.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_truncated_file_is_a_bad_image(kind: str) -> None:
    encoded = encode(rng.integers(0, 256, (60, 60, 3), np.uint8), kind)
    for keep in (0.9, 0.5):
        cut = encoded[: int(len(encoded) * keep)]
        with pytest.raises(BadImage) as raised:
            to_rgb(cut)
        assert "\n" not in str(raised.value)
        if kind == "JPEG":
            assert not is_plain_jpeg(cut)


@pytest.mark.parametrize("encoded", [b"", b"\xff\xd8", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"0" * 100])
def test_a_file_that_is_no_image_is_a_bad_image(encoded: bytes) -> None:
    with pytest.raises(BadImage, match="is not an image in one of the formats JPEG"):
        to_rgb(encoded)


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    header = bytearray(saved(Image.new("1", (8, 8)), "BMP"))
    header[18:26] = (50_000).to_bytes(4, "little") * 2
    with pytest.raises(BadImage, match=f"more than {MAX_PIXELS}"):
        to_rgb(bytes(header))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BadImage, match="floating-point pixels"):
        to_rgb(saved(Image.fromarray(np.zeros((3, 3), np.float32)), "TIFF"))
