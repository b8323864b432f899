"""The pictures of infer.py: figures 3 and 4, and accuracy against the number of labelled clips.

    python infer.py show runs/tiny assets/clips/guitar_chord.flac --out heads.png
    python infer.py compare assets/few_labels.jsonl --plot few_labels.png
    python infer.py probe tiny runs/tiny --data tones:note:200 --plot probe.png
"""
import re

import numpy as np
from matplotlib.figure import Figure


def draw_probes(results, data, path):
    """Accuracy over the checkpoints of each run, a level line for other models (figure 3)."""
    figure = Figure(figsize=(8, 3.2), dpi=90, layout="constrained")
    names = list(dict.fromkeys(r["model"] for r in results))
    for axis, position in zip(figure.subplots(1, 2, sharey=True), ("think", "pre-gen")):
        for i, name in enumerate(names):
            found = [r for r in results if r["model"] == name and position in r]
            accuracy = [r[position]["accuracy"] for r in found]
            if found and found[0]["step"]:
                axis.errorbar([r["step"] for r in found], accuracy,
                              [r[position]["deviation"] for r in found], color=f"C{i}", label=name)
            elif found:
                axis.axhline(accuracy[0], color=f"C{i}", label=name)
        axis.set(xlabel="step", title=position, ylabel=f"accuracy of the probe, {data}")
        axis.legend(fontsize=8)
    figure.savefig(path, format="png")


def draw_arms(means, path):
    """Accuracy against the number at the end of the name of the data, one picture a question.

    means   {(data, question): {arm: (mean, half of its interval)}}"""
    points = {}    # {question: {arm: [(number, mean, half)]}}
    for (data, question), arms in means.items():
        number = re.search(r"\d+$", data)
        for arm, mean in arms.items() if number else ():
            points.setdefault(question, {}).setdefault(arm, []).append((int(number[0]), *mean))
    if not points:
        raise ValueError("--plot needs data whose names end in numbers, such as tones:note:28")
    figure = Figure(figsize=(1 + 4 * len(points), 3.5), dpi=90, layout="constrained")
    arms = list(dict.fromkeys(arm for found in points.values() for arm in found))
    for axis, (question, found) in zip(figure.subplots(1, len(points), squeeze=False)[0],
                                       points.items()):
        for arm, values in found.items():
            k = arms.index(arm)
            numbers, heights, halves = np.transpose(sorted(values))
            apart = 1.04 ** k    # so that intervals do not hide each other
            axis.errorbar(numbers * apart, heights, halves, marker="o", markersize=3, label=arm,
                          color=f"C{k}")
        ticks = sorted({number for values in found.values() for number, _, _ in values})
        axis.set(xscale="log", xlabel="labelled clips", ylabel="right answers, %", title=question)
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, format="png")


def picture(task, z_hat, z, expert):
    """(student (K, L), expert (K, L), [names of the K rows]) of features (L, E), as figure 4 shows
    them: emotions that the expert's file can name, the contour, the ten strongest events, else the
    64 dimensions that vary most."""
    rows, names = slice(None), []
    if task == "affect" and expert.readout:
        z_hat, z = (expert.readout(x).softmax(1) for x in (z_hat, z))
        names = expert.EMOTIONS
    elif task == "pitch":    # the strongest third of each semitone
        z_hat, z = (expert.readout(x).sigmoid().unflatten(1, (88, 3)).amax(2) for x in (z_hat, z))
    elif task == "sound":
        z_hat, z = (expert.readout(x).sigmoid() for x in (z_hat, z))
        rows = z.amax(0).topk(10).indices.flip(0)
        names = [f"event {i}" for i in rows.tolist()]
    else:
        rows = z.var(0).topk(min(64, z.shape[1])).indices
    return z_hat.T[rows], z.T[rows], names


def draw_heads(student, target, losses, experts, seconds, path):
    """What each head reconstructs beside what its expert hears (figure 4).

    student, target     {task: features (L, E)}; losses: {term: share unexplained}"""
    figure = Figure(figsize=(9, 2.4 * len(student)), dpi=80, layout="constrained")
    for task, axes in zip(student, figure.subplots(len(student), 2, squeeze=False)):
        *images, names = picture(task, student[task], target[task], experts[task])
        low, high = np.quantile(images[1].cpu(), [0.01, 0.99])
        for axis, image in zip(axes, images):
            axis.imshow(image.cpu().numpy(), aspect="auto", origin="lower", vmin=low, vmax=high,
                        extent=(0, seconds, -0.5, len(image) - 0.5), interpolation="nearest")
            axis.set_yticks(range(len(names)), names)
            axis.set_xlabel("s")
        terms = [f"{term}: {loss:.2f} unexplained" for term, loss in losses.items()
                 if term.startswith(task)]
        axes[0].set_title(", ".join(terms), fontsize=9, loc="left")
        axes[1].set_title(type(experts[task]).__name__, fontsize=9)
    figure.savefig(path, format="png")
