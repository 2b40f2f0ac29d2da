"""The record of reasons: questions that run directories answer, years later and without the people who made them."""
