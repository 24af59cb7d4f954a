"""How much images differ: PSNR and SSIM."""

import numpy as np

from lightwam_jax.encoders import base

_WINDOW = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
_WINDOW /= _WINDOW.sum()


def psnr(images, reference):
    """Returns the peak signal-to-noise ratio in dB of canvases of one shape, uint8 or float32."""
    error = np.mean((base.in_255(images) - base.in_255(reference)) ** 2)
    return float(10 * np.log10(255.0**2 / max(error, 1e-12)))


def ssim(images, reference):
    """Returns the mean structural similarity of two images [H,W,3], uint8 or float32: -1 to 1.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE Trans. Image Processing 13 (2004), with the constants given there:
    a Gaussian window of 11x11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03. Windows that cross
    the border are left out. Colours are compared one by one and averaged.

    Raises:
      ValueError: images of different shapes, or smaller than the window.
    """
    a, b = (base.in_255(x).astype(np.float64) for x in (images, reference))
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[:2]) < len(_WINDOW):
        raise ValueError(
            f"SSIM of images {list(a.shape)} and {list(b.shape)}; expected two of one shape "
            f"[H,W,3] of at least {len(_WINDOW)} pixels each way"
        )
    mean_a, mean_b = _smooth(a), _smooth(b)
    variance_a, variance_b = _smooth(a * a) - mean_a**2, _smooth(b * b) - mean_b**2
    covariance = _smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    agreement = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    most = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float((agreement / most).mean())


def _smooth(image):
    """[H,W,3] -> [H-10,W-10,3], the Gaussian mean around each pixel that has room for it."""
    slide = np.lib.stride_tricks.sliding_window_view
    rows = slide(image, len(_WINDOW), axis=0) @ _WINDOW
    return slide(rows, len(_WINDOW), axis=1) @ _WINDOW
