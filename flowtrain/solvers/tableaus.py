"""Butcher tableaus of explicit Runge-Kutta methods, as data. The stepping loop is in runge_kutta.py.

Sources: Bogacki and Shampine 1989 (bosh3), Dormand and Prince 1980 (dopri5), Tsitouras 2011 (tsit5).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """Stages k_i = f(t + c_i h, x + h sum_j a_ij k_j); x1 = x + h sum b_i k_i; error = h sum e_i k_i.

    Attributes:
        order: of x1.
        c, a, b: the method; a has one row for each stage after the first.
        e: b minus the embedded weights, or None where the method has no error estimate.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...] | None = None

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is f(t + h, x1), so that the next step has its first stage for nothing."""
        return bool(self.a) and self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0


def _same_as_last(
    order: int, c: tuple[float, ...], a: tuple[tuple[float, ...], ...], embedded_error: tuple[float, ...]
) -> Tableau:
    """A method whose last stage is at its own solution: b is the last row of a."""
    return Tableau(order, c, a, (*a[-1], 0.0), embedded_error)


TABLEAUS = {
    "euler": Tableau(order=1, c=(0.0,), a=(), b=(1.0,)),
    "midpoint": Tableau(order=2, c=(0, 1 / 2), a=((1 / 2,),), b=(0, 1)),
    "rk4": Tableau(
        order=4,
        c=(0, 1 / 2, 1 / 2, 1),
        a=((1 / 2,), (0, 1 / 2), (0, 0, 1)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    "bosh3": _same_as_last(
        order=3,
        c=(0, 1 / 2, 3 / 4, 1),
        a=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        embedded_error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    ),
    "dopri5": _same_as_last(
        order=5,
        c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        a=(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        embedded_error=(
            35 / 384 - 5179 / 57600,
            0,
            500 / 1113 - 7571 / 16695,
            125 / 192 - 393 / 640,
            -2187 / 6784 + 92097 / 339200,
            11 / 84 - 187 / 2100,
            -1 / 40,
        ),
    ),
    "tsit5": _same_as_last(
        order=5,
        c=(0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
        a=(
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            (
                0.09646076681806523,
                0.01,
                0.4798896504144996,
                1.379008574103742,
                -3.290069515436081,
                2.324710524099774,
            ),
        ),
        embedded_error=(
            -0.00178001105222577714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            1 / 66,
        ),
    ),
}
