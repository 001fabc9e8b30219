"""Print [[score from 0 to 10 of each attempt] of each subtask] as they stand in a grader's meta_eval.json: a
score an attempt; the mean of a text's and a picture's, as the paper has it (sec. 3.3); or one for the
smallest loss (Code 6 and 7), here of its attempt; or success (MCP 2).
"""

import json
import sys


def score_of(attempt, meta):
    if "loss" in attempt:
        return meta["final_score"] if attempt["loss"] == meta["best_loss"] else 0
    if "text_result" in attempt:
        return (attempt["text_result"]["score"] + attempt["vision_result"]["score"]) / 2
    if "judge_score" in attempt:
        return 10 * attempt["judge_score"]
    if "score" in attempt:
        return attempt["score"]
    return 10 * attempt["success"] if "success" in attempt else attempt["rubric"]["score"]


def attempt_scores(meta):
    subtasks = meta["subtasks"]
    table = []
    for subtask in subtasks.values() if isinstance(subtasks, dict) else subtasks:
        attempts = [attempt for attempt in subtask["attempts"] if attempt["attempt_index"]]  # 0: skipped
        table.append([score_of(attempt, meta) for attempt in attempts])
    if "rubric_recall" in meta:  # Research 4 and 5: an attempt's score says only that there is a file
        table[-1] = [min(score, meta["final_score"]) for score in table[-1]]
    return table


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps(attempt_scores(json.load(file))))
