"""placeholder"""
from align.algorithms.needs import Needs
from align.records import Preference
NEEDS = Needs(records=Preference, reference=True)
