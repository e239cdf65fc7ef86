"""Format ratios, times and sizes with two or three significant digits."""

from __future__ import annotations


def share(value: float) -> str:
    """Format a ratio.

    >>> share(0.0123), share(0.98765), share(1.0234), share(12.3456), share(123.4)
    ('0.012', '0.99', '1.02', '12.3', '123')
    """
    digits = 3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def seconds(value: float) -> str:
    """Format a time.

    >>> seconds(0.000512), seconds(0.0123), seconds(0.2345), seconds(12.34)
    ('0.512 ms', '12.3 ms', '234 ms', '12.3 s')
    """
    if value >= 1:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    thousandths = 1e3 * value
    return f"{thousandths:.{3 if thousandths < 1 else 1 if thousandths < 100 else 0}f} ms"


def megabytes(value: float) -> str:
    """Format a size.

    >>> megabytes(123_456_789)
    '123 MB'
    """
    return f"{value / 1e6:,.0f} MB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
