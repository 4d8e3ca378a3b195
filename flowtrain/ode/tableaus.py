"""Butcher tableaus of explicit Runge-Kutta methods, as data. The stepping loop is in runge_kutta.py.

Sources: Bogacki and Shampine 1989 (bosh3), Dormand and Prince 1980 (dopri5), Shampine 1986 (the weights `mid` of
dopri5), Tsitouras 2011 (tsit5), Prince and Dormand 1981 (dopri8).
"""

from dataclasses import dataclass

from flowtrain.utils.errors import ConfigError


@dataclass(frozen=True)
class Tableau:
    """The coefficients of an explicit Runge-Kutta method.

        k_i = f(t + c_i h, x + h sum_j a_ij k_j),    x1 = x + h sum_i b_i k_i,    error = h sum_i e_i k_i.

    Attributes:
        order: the order of x1.
        c, a, b: the coefficients above. a has one row for each stage after the first.
        e: b minus the embedded weights. None for a method without an error estimate.
        mid: the weights of x(t + h/2) = x + h sum_i mid_i k_i to 4th order, for the dense output in quadrature.py. None
            for a method without dense output.

    Raises:
        ConfigError: wrong numbers of coefficients, or sums that are not consistent.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...] | None = None
    mid: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.b)
        if len(self.c) != n or [len(row) for row in self.a] != list(range(1, n)) or len(self.e or self.b) != n:
            raise ConfigError(
                f"tableau: b has {n} numbers, so c and e need {n} numbers, and a needs {n - 1} rows, with i numbers in "
                "row i"
            )
        sums = [sum(row) for row in ((), *self.a, self.b, self.e or ())]
        if any(abs(found - wanted) > 1e-9 for found, wanted in zip(sums, (*self.c, 1, 0), strict=True)):
            raise ConfigError("tableau: each row of a must sum to its c, b must sum to 1 and e to 0")

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is f(t + h, x1), so that the next step can use it as its first stage."""
        return bool(self.a) and self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    @property
    def used(self) -> list[int]:
        """The indices of the stages with a nonzero weight in the solution or in its error."""
        e = self.e or self.b
        return [i for i in range(len(self.b)) if self.b[i] or e[i]]


def _fsal_tableau(
    order: int,
    c: tuple[float, ...],
    a: tuple[tuple[float, ...], ...],
    embedded_error: tuple[float, ...],
    mid: tuple[float, ...] | None = None,
) -> Tableau:
    """Builds the tableau of a method whose last stage is at x1. Then b is the last row of a."""
    return Tableau(order, c, a, (*a[-1], 0.0), embedded_error, mid)


TABLEAUS = {
    "euler": Tableau(order=1, c=(0.0,), a=(), b=(1.0,)),
    "midpoint": Tableau(order=2, c=(0, 1 / 2), a=((1 / 2,),), b=(0, 1)),
    "heun": Tableau(order=2, c=(0, 1), a=((1,),), b=(1 / 2, 1 / 2)),
    "rk4": Tableau(
        order=4,
        c=(0, 1 / 2, 1 / 2, 1),
        a=((1 / 2,), (0, 1 / 2), (0, 0, 1)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    "bosh3": _fsal_tableau(
        order=3,
        c=(0, 1 / 2, 3 / 4, 1),
        a=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        embedded_error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    ),
    "dopri5": _fsal_tableau(
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
        mid=(
            6025192743 / 30085553152 / 2,
            0,
            51252292925 / 65400821598 / 2,
            -2691868925 / 45128329728 / 2,
            187940372067 / 1594534317056 / 2,
            -1776094331 / 19743644256 / 2,
            11237099 / 235043384 / 2,
        ),
    ),
    "tsit5": _fsal_tableau(
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
        mid=(
            0.10741235230096871,
            0.01135625,
            0.39560903056045305,
            -0.34475214352593553,
            1.3161853649581645,
            -1.0170608542936508,
            0.03125,
        ),
    ),
    "dopri8": Tableau(
        order=8,
        c=(
            0.0,
            1 / 18,
            1 / 12,
            1 / 8,
            5 / 16,
            3 / 8,
            59 / 400,
            93 / 200,
            5490023248 / 9719169821,
            13 / 20,
            1201146811 / 1299019798,
            1,
            1,
        ),
        a=(
            (1 / 18,),
            (
                1 / 48,
                1 / 16,
            ),
            (
                1 / 32,
                0,
                3 / 32,
            ),
            (
                5 / 16,
                0,
                -75 / 64,
                75 / 64,
            ),
            (
                3 / 80,
                0,
                0,
                3 / 16,
                3 / 20,
            ),
            (
                29443841 / 614563906,
                0,
                0,
                77736538 / 692538347,
                -28693883 / 1125000000,
                23124283 / 1800000000,
            ),
            (
                16016141 / 946692911,
                0,
                0,
                61564180 / 158732637,
                22789713 / 633445777,
                545815736 / 2771057229,
                -180193667 / 1043307555,
            ),
            (
                39632708 / 573591083,
                0,
                0,
                -433636366 / 683701615,
                -421739975 / 2616292301,
                100302831 / 723423059,
                790204164 / 839813087,
                800635310 / 3783071287,
            ),
            (
                246121993 / 1340847787,
                0,
                0,
                -37695042795 / 15268766246,
                -309121744 / 1061227803,
                -12992083 / 490766935,
                6005943493 / 2108947869,
                393006217 / 1396673457,
                123872331 / 1001029789,
            ),
            (
                -1028468189 / 846180014,
                0,
                0,
                8478235783 / 508512852,
                1311729495 / 1432422823,
                -10304129995 / 1701304382,
                -48777925059 / 3047939560,
                15336726248 / 1032824649,
                -45442868181 / 3398467696,
                3065993473 / 597172653,
            ),
            (
                185892177 / 718116043,
                0,
                0,
                -3185094517 / 667107341,
                -477755414 / 1098053517,
                -703635378 / 230739211,
                5731566787 / 1027545527,
                5232866602 / 850066563,
                -4093664535 / 808688257,
                3962137247 / 1805957418,
                65686358 / 487910083,
            ),
            (
                403863854 / 491063109,
                0,
                0,
                -5068492393 / 434740067,
                -411421997 / 543043805,
                652783627 / 914296604,
                11173962825 / 925320556,
                -13158990841 / 6184727034,
                3936647629 / 1978049680,
                -160528059 / 685178525,
                248638103 / 1413531060,
                0,
            ),
        ),
        b=(
            14005451 / 335480064,
            0,
            0,
            0,
            0,
            -59238493 / 1068277825,
            181606767 / 758867731,
            561292985 / 797845732,
            -1041891430 / 1371343529,
            760417239 / 1151165299,
            118820643 / 751138087,
            -528747749 / 2220607170,
            1 / 4,
        ),
        e=(
            14005451 / 335480064 - 13451932 / 455176623,
            0,
            0,
            0,
            0,
            -59238493 / 1068277825 - -808719846 / 976000145,
            181606767 / 758867731 - 1757004468 / 5645159321,
            561292985 / 797845732 - 656045339 / 265891186,
            -1041891430 / 1371343529 - -3867574721 / 1518517206,
            760417239 / 1151165299 - 465885868 / 322736535,
            118820643 / 751138087 - 53011238 / 667516719,
            -528747749 / 2220607170 - 2 / 45,
            1 / 4,
        ),
    ),
}
