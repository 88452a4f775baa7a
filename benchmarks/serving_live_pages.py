"""The page and the picture of the live measurement, from its JSON."""


def tables(found):
    return ""


def picture(found):
    return ""
