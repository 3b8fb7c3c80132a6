"""Write the bundled sample of synthetic ratings.

    python Data/sample/make_sample.py        # gives ratings.csv and titles.csv again, byte for byte

A rating is the user's level + the item's effect (drifting with the years) + taste . item factors (the taste
moves from one point to another during the user's history) + a mood that fades over some ratings + satiation
with a genre just seen + noise, rounded and cut to 1..5. Half of the users sit above the top of the scale:
many give almost only 4s and 5s.
"""

import argparse
from pathlib import Path

import numpy as np

LEVELS = [5.2, 3.9, 3.0]  # of enthusiasts, ordinary users and critics
SHARES = [0.53, 0.31, 0.16]
GENRES = "comedy", "drama", "thriller", "romance", "western", "animation", "science fiction", "horror"
START, YEARS = 1_400_000_000, 4  # seconds; length of the period
YEAR = 365 * 24 * 3600


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description="Write the bundled sample of synthetic ratings.")
    add = parser.add_argument
    default = Path(__file__).with_name("ratings.csv")
    add("--output", default=default, help="file to write, beside titles.csv (default: %(default)s)")
    add("--seed", type=int, default=20, help="random seed (default: %(default)s)")
    add("--users", type=int, default=900, help="number of users (default: %(default)s)")
    add("--items", type=int, default=220, help="number of items (default: %(default)s)")
    add("--rank", type=int, default=3, help="number of taste dimensions (default: %(default)s)")
    return parser.parse_args(arguments)


def make_items(random, options):
    """Everything about the items: genre, effect, yearly drift, factors, popularity."""
    genre = random.randint(len(GENRES), size=options.items)
    centres = random.normal(0, 1, (len(GENRES), options.rank))
    return {
        "genre": genre,
        "effect": random.normal(0, 0.45, options.items),
        "drift": random.normal(0, 0.12, options.items),
        "factors": 0.8 * centres[genre] + random.normal(0, 0.6, (options.items, options.rank)),
        "weight": (1 + random.permutation(options.items)) ** -0.3,
    }


def choose_items(random, items, taste, length):
    """A user's items in order: mostly liked ones, often of the same genre as the one before, none twice."""
    weight = items["weight"] * np.exp(0.4 * items["factors"] @ taste)
    chosen = []
    for _ in range(length):
        now = weight.copy()
        if chosen and random.random_sample() < 0.5:
            now *= np.where(items["genre"] == items["genre"][chosen[-1]], 1.0, 1e-6)
        choice = random.choice(len(now), p=now / now.sum())
        weight[choice] = 0
        chosen.append(choice)
    return np.array(chosen)


def rate(random, items, chosen, tastes, level, years):
    """Ratings 1..5 of the chosen items, (length,); tastes: (length, rank), years since START: (length,)."""
    mood, moods = 0.0, []
    for _ in chosen:
        mood = 0.7 * mood + random.normal(0, 0.3)
        moods.append(mood)
    genre = items["genre"][chosen]
    sated = np.append(False, genre[1:] == genre[:-1])
    score = level + items["effect"][chosen] + items["drift"][chosen] * (years - YEARS / 2)
    score += (items["factors"][chosen] * tastes).sum(1) + np.array(moods) - 0.5 * sated
    return np.clip(np.rint(score + random.normal(0, 0.4, len(chosen))), 1, 5).astype(int)


def make_user(random, items, options):
    """One user's item numbers, ratings and times, each (length,)."""
    length = min(10 + int(random.exponential(38)), 80)
    begin, step = random.normal(0, 0.65, (2, options.rank))
    end = 0.6 * begin + 0.8 * step
    tastes = begin + np.linspace(0, 1, length)[:, None] * (end - begin)
    level = random.choice(LEVELS, p=SHARES) + random.normal(0, 0.25)
    chosen = choose_items(random, items, begin, length)
    waits = 1 + random.exponential(YEAR / 2 / 80, length)
    times = START + random.randint(YEARS * YEAR - YEAR // 2) + np.cumsum(waits)
    ratings = rate(random, items, chosen, tastes, level, (times - START) / YEAR)
    return chosen, ratings, times.astype(np.int64)


def make_rows(options):
    """((user, item, rating, time) rows in order of time, the items' titles)."""
    random = np.random.RandomState(options.seed)
    items = make_items(random, options)
    titles = [f"Film {number} ({GENRES[genre]})" for number, genre in enumerate(items["genre"], 1)]
    rows = []
    for user in range(1, options.users + 1):
        for item, rating, time in zip(*make_user(random, items, options), strict=True):
            rows.append((user, item + 1, rating, time))
    return sorted(rows, key=lambda row: (row[3], row[0])), titles


def write(path, header, rows):
    path.write_text("".join([f"{header}\n", *(",".join(map(str, row)) + "\n" for row in rows)]), newline="\n")


def main():
    options = parse_options()
    rows, titles = make_rows(options)
    write(Path(options.output), "user_id,item_id,rating,timestamp", rows)
    write(Path(options.output).with_name("titles.csv"), "item_id,title", enumerate(titles, 1))


if __name__ == "__main__":
    main()
