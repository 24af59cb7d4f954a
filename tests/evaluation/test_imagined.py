"""What is said of imagined video beside the first frame repeated."""

import pytest

from lightwam_jax.evaluation import imagined


def numbers(psnr, ssim):
    """Gains over the first frame repeated, at offsets 2, 4, 6 ..."""
    made = {"offsets": [2 * k + 2 for k in range(len(psnr))], "windows": [9] * len(psnr)}
    made |= {"nearer": {"psnr": [4] * len(psnr), "ssim": [3] * len(psnr)}, "lambda_video": 1.0}
    for kind, base, gains in (("psnr", 20.0, psnr), ("ssim", 0.5, ssim)):
        still = [base] * len(gains)
        better = [base + gain for gain in gains]
        made[kind] = {"codec": still, "still": still, "predicted": better}
    return made


@pytest.mark.parametrize(
    "psnr, ssim, expected",
    [
        (
            [-0.7, 0.2, -0.1, 1.4, 0.3],
            [-0.1, 0.0, 0.01, 0.02, 0.02],
            "The imagined video beats repeating the first frame at some offsets only. "
            "PSNR: better at +4, +8 to +10 (by 0.2 to 1.4 dB), not better at +2, +6 (0.1 to 0.7 dB "
            "less). SSIM: better at +6 to +10 (by 0.010 to 0.020), not better at +2 to +4 (0.000 "
            "to 0.100 less). At +2: PSNR 19.3 dB, repeating 20.0 dB (nearer in 4 of 9 windows), "
            "SSIM 0.400, repeating 0.500 (nearer in 3 of 9 windows).",
        ),
        (
            [-9.0, -12.0],
            [-0.1, -0.1],
            "The imagined video never beats repeating the first frame. PSNR: better at no offset "
            "(9.0 to 12.0 dB less). SSIM: better at no offset (0.100 less). At +2: PSNR 11.0 dB, "
            "repeating 20.0 dB (nearer in 4 of 9 windows), SSIM 0.400, repeating 0.500 (nearer in "
            "3 of 9 windows).",
        ),
        (
            [1.0, 1.0],
            [0.1, 0.2],
            "The imagined video beats repeating the first frame at every offset. PSNR: better at "
            "every offset (by 1.0 dB). SSIM: better at every offset (by 0.100 to 0.200). At +2: "
            "PSNR 21.0 dB, repeating 20.0 dB (nearer in 4 of 9 windows), SSIM 0.600, repeating "
            "0.500 (nearer in 3 of 9 windows).",
        ),
    ],
)
def test_the_caption_has_the_numbers(psnr, ssim, expected):
    assert imagined.verdict(numbers(psnr, ssim)) == expected


def test_a_policy_that_never_learned_to_imagine_is_not_blamed():
    without = numbers([-1.0], [-0.1]) | {"lambda_video": 0.0}
    assert "trained without the video loss" in imagined.verdict(without)
    assert "trained without" not in imagined.verdict(numbers([-1.0], [-0.1]))


def test_the_caption_stands_under_the_frames(tmp_path):
    frames, video, psnr, ssim = imagined.media(tmp_path, numbers([1.0], [-0.1]))
    assert frames.caption.startswith("The imagined video beats") and frames.drawn and video.drawn
    assert psnr.series["imagined"] == ([2], [21.0]) and "SSIM" in ssim.title
    assert set(psnr.series) == {"codec limit", "imagined", "first frame repeated"}
