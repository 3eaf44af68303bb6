"""Feedback on rollouts: what the teacher sees of each is made after it was written.

`interface` has what a function of feedback is given and returns; `find` knows functions by name, and `stage` calls one
in each step. `sdpo`, `successes` and `judge` come with the package.
"""

from sdft.feedback.interface import Feedback, FeedbackFunction, Rollout, by_prompt

__all__ = ["Feedback", "FeedbackFunction", "Rollout", "by_prompt"]
