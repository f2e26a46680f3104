"""Numbers as a person reads them."""

from engine.format import (
    clock_time,
    duration,
    format_bytes,
    format_count,
    in_words,
    join_words,
    money,
    quantity,
    si,
    significant,
    times,
)


def test_durations_counts_and_sizes_read_well():
    assert [clock_time(s) for s in (0, 65, 3725)] == ["0:00", "1:05", "1:02:05"]
    expected = {0.25: "0.25 s", 4.13: "4.1 s", 180: "3 min", 200: "3 min 20 s", 5400: "1 h 30 min"}
    assert {seconds: duration(seconds) for seconds in expected} == expected
    assert [format_count(n) for n in (950, 4_204_800, 25.6e6, 729e9)] == ["950", "4.20 M", "25.6 M", "729 G"]
    assert [format_bytes(n) for n in (12, 1.5e9, 216e3)] == ["12 B", "1.5 GB", "216 kB"]
    assert [quantity(n, "step") for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
    assert join_words(["a", "b", "c"]) == "a, b and c"


def test_quantities_read_well():
    narrow = "\u202f"
    assert [si(x, "s") for x in (98.0e-6, 0.0, 999.9e-6, 1.5, None)] == [
        f"98.0{narrow}µs",
        f"0{narrow}s",
        f"1.00{narrow}ms",
        f"1.50{narrow}s",
        "–",
    ]
    assert si(21_340_160, "FLOP") == f"21.3{narrow}MFLOP"
    assert si(0, "") == "0"
    assert [in_words(x) for x in (640, 13.5e6, 1.92e9, 5e15)] == [
        "640",
        "13.5 million",
        "1.92 billion",
        "5,000 trillion",
    ]
    assert [money(x) for x in (0.01153, 2.3, 1240.4, 0.0)] == ["$0.0115", "$2.30", "$1,240", "$0"]
    assert [times(x) for x in (3, 19.49, 0.333)] == ["3.00×", "19.5×", "0.33×"]
    assert [significant(x) for x in (9.999, 0.09999, 123.4, 99.95)] == ["10.0", "0.100", "123", "100"]
