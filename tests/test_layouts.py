"""The tables of docs/DATA.md: every kind of file, with the options given there, gives the result given there."""

import re
from pathlib import Path

import pandas as pd
import pytest
from test_datasets import data_options

from ratings import readers
from utils import UserError

PAGE = (Path(__file__).parents[1] / "docs" / "DATA.md").read_text()
TIMES = (881250949, 881250950, 881250949, 881250950)
USERS, ITEMS, RATINGS = "1122", ("10", "11", "10", "11"), (3, 4, 2, 5)
AMAZON_USERS, AMAZON_ITEMS = [f"AWUSER000000{u}" for u in USERS], [f"B0000000{i}" for i in ITEMS]


def tables(heading):
    """Rows of the tables below a heading, as lists of cells."""
    part = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.replace("`|`", "").strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return rows[1:]


def rows(pattern, header="", users=USERS, items=ITEMS, ratings=RATINGS, times=TIMES):
    lines = [pattern.format(u=u, i=i, r=r, t=t) for u, i, r, t in zip(users, items, ratings, times, strict=True)]
    return "\n".join([header] * bool(header) + lines) + "\n"


NAMES = ("café", "thé", "café", "thé")
FILES = {
    "MovieLens 100K": rows("{u}\t{i}\t{r}\t{t}"),
    "MovieLens 1M and 10M": rows("{u}::{i}::{r}::{t}"),
    "MovieLens 20M and later": rows("{u},{i},{r},{t}", "userId,movieId,rating,timestamp"),
    "MovieTweetings": rows("{u}::00{i}::{r}::{t}"),
    "Amazon 2023, CSV": rows("{u},{i},{r},{t}007", "user_id,parent_asin,rating,timestamp"),
    "Amazon 2014, ratings only": rows("{u},{i},{r}.0,{t}", users=AMAZON_USERS, items=AMAZON_ITEMS),
    "Amazon 2014, reviews": rows('{{"reviewerID": "{u}", "asin": "{i}", "overall": {r}, "unixReviewTime": {t}}}'),
    "Amazon, from Kaggle": rows("{u},{i},{r},{t}", "UserId,ProductId,Rating,Timestamp"),
    "Yelp": rows(
        '{{"user_id": "{u}", "business_id": "{i}", "stars": {r}, "date": "1997-12-04 15:55:{t:.2}"}}',
        times=("49", "50") * 2,
    ),
    "RecBole": rows("{u}\t{i}\t{r}\t{t}", "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
    "Goodbooks": rows("{u},{i},{r}", "user_id,book_id,rating"),
    "MyAnimeList, from Kaggle": rows("{u},{i},{r}", "user_id,anime_id,rating") + "2,12,-1\n",
    "BookCrossing": (rows('"{u}";"{i}";"{r}"', '"User-ID";"ISBN";"Book-Rating"') + '"2";"é";"0"\n').encode("latin-1"),
    "Jester": rows("{u}\t\t{i}\t\t{r}"),
    "three columns without a header": rows("{u} {i} {r}"),
    "columns padded with blanks": rows("{u}   {i}  {r}"),
    "the same, said": rows("{u}   {i}  {r} "),
    "an index before the columns": rows("{r},{u},{i},{r},{t}", ",user,item,rating,time"),
    "other names": rows("{u},{i},{r},{t}", "who,what,mark,day", times=("1997-12-04", "1997-12-05") * 2),
    "two columns": "1\t258\n1\t268\n",
    "Latin-1": rows("{u};{i};{r};{t}", "user;item;rating;time", items=NAMES).encode("latin-1"),
    "UTF-16": rows("{u};{i};{r};{t}", "user;item;rating;time", items=NAMES).encode("utf-16"),
    "XML": '<?xml version="1.0"?>\n<myanimelist>\n<anime><my_score>8</my_score></anime>\n</myanimelist>\n',
    "Parquet": pd.DataFrame({"user": list(USERS), "item": ITEMS, "rating": RATINGS, "time": TIMES}).to_parquet(),
}


def read(folder, content, scale=None, one_user=False, **options):
    path = folder / "ratings"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    columns, notes = readers.read_columns(path, data_options(**options), scale, one_user)
    cells = columns.user_ids[columns.users], columns.item_ids[columns.items], columns.ratings, columns.times
    return list(zip(*(cell.tolist() for cell in cells), strict=True)), notes


@pytest.mark.parametrize("row", tables("Formats"), ids=lambda row: row[0])
def test_every_format_gives_its_result(tmp_path, row):
    kind, begins, options, result = row
    content = FILES.get(kind, FILES.get(kind.split(",")[0]))
    if isinstance(content, str) and "..." not in begins:
        assert content.startswith(begins.strip("`").replace("⇥", "\t"))
    given = dict(re.findall(r"--(\w+)=(\S+)", options.strip("`")))
    if result.startswith("error: "):
        with pytest.raises(UserError, match=re.escape(result.removeprefix("error: "))):
            read(tmp_path, content, **given)
        return
    found, notes = read(tmp_path, content, **given)
    assert [(user[-1], rating) for user, _, rating, _ in found] == list(zip(USERS, RATINGS, strict=True))
    assert all(item.lstrip("B0") in {*ITEMS, *NAMES} for _, item, _, _ in found)
    times = [time for *_, time in found]
    if "no header" in str(notes) or "time column" in str(notes):
        assert times == [0, 1, 2, 3]
    else:
        assert times[0] == times[2] < times[1] == times[3]
    assert not notes if result == "read" else any(result in note for note in notes)


@pytest.mark.parametrize("row", tables("Times"), ids=lambda row: row[0][:20])
def test_every_way_to_write_dates_gives_its_result(tmp_path, row):
    texts, result = row
    for text in re.findall("`(.*?)`", texts):
        content = (
            f'user,item,rating,time\n1,10,3,"{text}"\n1,11,4,"{text.replace("15", "16").replace("/08/", "/09/")}"\n'
        )
        if result.startswith("error: "):
            with pytest.raises(UserError, match=result.removeprefix("error: ")):
                read(tmp_path, content)
        else:
            (*_, first), (*_, second) = read(tmp_path, content)[0]
            assert second - first == 86400 * 10**9
            assert pd.Timestamp(first, unit="ns").date().isoformat() == "2017-07-15"


EXPORTS = {
    "MovieLens": (
        "movie_id,imdb_id,tmdb_id,rating,average_rating,title\n"
        '2571,0133093,603,4.0,4.1,"Matrix, The (1999)"\n260,0076759,11,3.5,4.0,Star Wars (1977)\n',
        [("2571", 4.0, "Matrix, The (1999)"), ("260", 3.5, "Star Wars (1977)")],
    ),
    "Letterboxd": (
        "Date,Name,Year,Letterboxd URI,Rating\n2024-01-03,The Matrix,1999,https://boxd.it/a,4\n"
        "2024-01-02,Brave,2012,https://boxd.it/b,3.5\n2024-01-02,Up,2009,https://boxd.it/c,\n",
        [("The Matrix (1999)", 4.0, "The Matrix (1999)"), ("Brave (2012)", 3.5, "Brave (2012)")],
    ),
    "IMDb": (
        "Const,Your Rating,Date Rated,Title,Original Title,URL,Title Type,IMDb Rating,Year\n"
        'tt0133093,8,2024-01-03,The Matrix,The Matrix,https://x,Movie,8.7,1999\ntt1217209,7,2024-01-02,"Brave, ""or""",B,https://x,Movie,7,2012\n',
        [("tt0133093", 4.0, "The Matrix (1999)"), ("tt1217209", 3.5, 'Brave, "or" (2012)')],
    ),
    "Goodreads": (
        "Book Id,Title,Author,ISBN,My Rating,Average Rating,Date Read,Date Added\n"
        '1,Dune,Herbert,"=""0441013597""",4,4.2,,2024/01/03\n2,Emma,Austen,,3,4.0,2023/01/01,2024/01/02\n3,Ulysses,Joyce,,0,3,,2024/01/01\n',
        [("1", 4.0, "Dune"), ("2", 3.0, "Emma")],
    ),
    "MyAnimeList": (
        "series_animedb_id,series_title,my_score,my_finish_date\n"
        "20,Naruto,8,0000-00-00\n21,One Piece,7,0000-00-00\n5,Bebop,0,\n",
        [("20", 4.0, "Naruto"), ("21", 3.5, "One Piece")],
    ),
}


@pytest.mark.parametrize("site", [row[0] for row in tables("One person's ratings")])
def test_every_export_is_one_users_ratings(tmp_path, site):
    content, expected = EXPORTS[site]
    path = tmp_path / "export.csv"
    path.write_text(content)
    columns, notes = readers.read_columns(path, data_options(mode=None), (1.0, 5.0), one_user=True)
    items = columns.item_ids[columns.items].tolist()
    titles = [columns.titles[item] for item in items]
    assert list(zip(items, columns.ratings.tolist(), titles, strict=True)) == expected
    assert columns.user_ids.tolist() == ["me"] and columns.users.tolist() == [0, 0]
    assert f"{site}'s export: its ratings are taken as one user's" in notes
    assert (columns.times[0] > columns.times[1]) == (columns.unit is not None)  # the first is the later one
    assert ("its ratings are multiplied by 0.5" in notes) == (site in ("IMDb", "MyAnimeList"))
    with pytest.raises(UserError, match="which is the user"):
        readers.read_columns(path, data_options(mode=None))


def test_ratings_of_an_export_keep_to_the_scale(tmp_path):
    content = EXPORTS["IMDb"][0]
    found, notes = read(tmp_path, content.replace(",8,", ",1,", 1), (1.0, 5.0), True, mode=None)
    assert [row[2] for row in found] == [1.0, 3.5] and "1 ratings below 1 are taken as 1" in notes
    assert [row[2] for row in read(tmp_path, content, (0.0, 10.0), True, mode=None)[0]] == [8.0, 7.0]
    with pytest.raises(UserError, match="line 2: .* outside the scale 1 to 10"):
        read(tmp_path, content.replace(",8,", ",11,", 1), (1.0, 5.0), True, mode=None)


def test_other_files_without_users_are_one_users_unless_items_repeat(tmp_path):
    assert [row[:3] for row in read(tmp_path, "item,rating\na,5\nb,4\n", (1, 5), True)[0]] == [
        ("me", "a", 5.0),
        ("me", "b", 4.0),
    ]
    assert [row[:3] for row in read(tmp_path, "7,5\n007,4\n", (1, 5), True)[0]] == [
        ("me", "7", 5.0),
        ("me", "007", 4.0),
    ]
    with pytest.raises(UserError, match="rates an item twice, so it may be of several users"):
        read(tmp_path, "customer,item,rating\n1,a,5\n2,a,4\n", (1, 5), True)


def test_titles_stand_for_ids_in_a_file_of_one_user(tmp_path):
    rows, _ = read(tmp_path, "title,rating,date\nHeat,4,07/15/2017\nSpeed,3,07/16/2017\n", one_user=True)
    assert [row[1:3] for row in rows] == [("Heat", 4), ("Speed", 3)]
    with pytest.raises(UserError, match="--columns=item:NAME,rating:rating"):
        read(tmp_path, "what,rating\nHeat,4\n", one_user=True)
