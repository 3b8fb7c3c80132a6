"""Pictures of a comparison, PNG and SVG, told apart by colour, marker and line: for print and colour-blind readers."""


def draw_all(folder, rows, about, figures):
    """Draw every picture."""
