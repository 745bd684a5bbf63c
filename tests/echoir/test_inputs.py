import pytest
from inputs import find_jobs, left_out


@pytest.fixture
def album(tmp_path):
    for name in ("Ferien/zürich 1.png", "Ferien/zürich 2.jpg", "Ferien/tief/日本.TIF", "notes.txt"):
        path = tmp_path / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "album"


def targets(inputs, output):
    jobs = find_jobs([str(text) for text in inputs], output)
    assert all(job.source.is_file() for job in jobs)
    return [job.target.relative_to(output).as_posix() for job in jobs]


def test_files_folders_and_patterns(album, tmp_path):
    out = tmp_path / "out"
    assert targets([album / "Ferien"], out) == ["zürich 1.png", "zürich 2.jpg"]
    assert targets([album / "Ferien" / "tief" / "日本.TIF"], out) == ["日本.TIF"]
    assert targets([album / "*" / "*.jpg"], out) == ["Ferien/zürich 2.jpg"]
    deep = ["Ferien/tief/日本.TIF", "Ferien/zürich 1.png", "Ferien/zürich 2.jpg"]
    assert targets([album / "**" / "*"], out) == deep
    assert targets([album / "Ferien" / "z?rich 1.png"], out) == ["zürich 1.png"]


def test_patterns_relative_to_here(album, tmp_path, monkeypatch):
    monkeypatch.chdir(album)
    assert targets(["**/*.png"], tmp_path / "out") == ["Ferien/zürich 1.png"]


def test_a_name_that_looks_like_a_pattern(tmp_path):
    for name in ("a[1].png", "a1.png"):
        (tmp_path / name).touch()
    assert targets([tmp_path / "a[1].png"], tmp_path / "out") == ["a[1].png"]
    assert targets([tmp_path / "a[0-9].png"], tmp_path / "out") == ["a1.png"]


def test_one_image_named_twice_is_one(album, tmp_path):
    inputs = [album / "Ferien", album / "Ferien" / "*.png"]
    assert targets(inputs, tmp_path / "out") == ["zürich 1.png", "zürich 2.jpg"]


def test_two_images_of_one_name(album, tmp_path):
    other = tmp_path / "zürich 1.png"
    other.touch()
    with pytest.raises(ValueError, match=r"different names.*zürich 1\.png and .*zürich 1\.png"):
        targets([album / "Ferien", other], tmp_path / "out")


def test_an_input_is_never_replaced(album, tmp_path):
    folder = album / "Ferien"
    with pytest.raises(ValueError, match="must not replace an input"):
        targets([folder], folder)
    with pytest.raises(ValueError, match="must not replace an input"):
        targets([folder], tmp_path / "album" / "Ferien" / "tief" / "..")
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    with pytest.raises(ValueError, match="must not replace an input"):
        targets([folder], link)


def test_another_s_input_is_not_replaced_either(tmp_path):
    for name in ("a/x.png", "a/b/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="must not replace an input"):
        targets([tmp_path / "a" / "**" / "*.png"], tmp_path / "a" / "b" / "..")


def test_what_a_folder_holds_besides_images_is_told(album):
    (album / "Ferien" / "film.gif").touch()
    (album / "Ferien" / "list.txt").touch()
    inside = left_out([str(album / "Ferien")])
    assert inside.startswith("left out: 2 files of other kinds, 1 subfolder, which ")
    assert f"'{album / 'Ferien' / '**' / '*'}'" in inside
    assert left_out([str(album / "Ferien" / "tief")]) == ""
    assert left_out([str(album / "Ferien" / "zürich 1.png")]) == ""
    assert left_out([str(album / "**" / "*")]) == "left out: 3 files of other kinds"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "Got none. Name one"),
        (["absent.png"], "An input must exist. Got absent.png"),
        (["."], r"must hold images .* Got \., which is empty\. Name "),
        (["*.nothing"], r"\.jpg.*Got \*\.nothing, which matches none\. Check the path"),
    ],
)
def test_nothing_is_meant(inputs, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_jobs(inputs, tmp_path)
