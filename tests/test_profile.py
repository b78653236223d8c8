"""`--profile DIR` leaves a trace there."""

from commands import FAST, bdjax, refused


def test_a_trace_is_written(blobs_npz, capsys, tmp_path):
    argv = ["train", "clean", "--dataset", blobs_npz, *FAST, "--out", tmp_path / "v", "--profile", tmp_path / "p"]
    bdjax(capsys, *argv)
    traces = list((tmp_path / "p").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


def test_a_file_is_no_place_for_it(capsys, tmp_path):
    (tmp_path / "p").write_text("")
    assert "--profile" in refused(capsys, "demo", "--out", tmp_path / "d", "--profile", tmp_path / "p")
    for command in ("run badnets ibau", "train clean", "demo"):
        assert "--profile" in bdjax(capsys, *command.split(), "--help")
