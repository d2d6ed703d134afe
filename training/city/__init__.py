"""The synthetic city: data sets in published formats, drawn from the synthetic street."""
