"""`dlcm mup check`: whether rates carry over to other widths and depths, by what the first steps move."""
