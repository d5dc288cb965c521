"use strict";
(() => {
  const PAUSE = 400;

  const same = (a, b) => a.length === b.length && a.every((format, i) => format === b[i]);

  /**
   * Plans for budgets and wishes of a moment. While an answer is on its way, only the last wish is remembered; when
   * nobody moves anything for a moment, it is asked once more with time for a proof.
   * @param {{answered: (answer: Object) => void, refused: (error: Error) => void}} on
   * @returns {{ask: (wish: () => Object|null) => Promise<void>, stop: () => void}} ``wish`` makes what is asked; null
   *   for nothing
   */
  MP.solver = (on) => {
    let [asking, again, waiting, last] = [false, null, 0, null];
    const prove = (asked, changed) => {
      waiting = setTimeout(async () => {
        // What comes of it cannot be counted on to come again, so its plan comes with it.
        const better = await MP.ask("resolve", { ...asked, patient: true, whole: true }).catch(() => null);
        if (better?.found && last === asked && !asking) on.answered({ ...better, changed, asked: { ...asked, patient: true } });
      }, PAUSE);
    };
    const ask = async (wish) => {
      clearTimeout(waiting);
      if (asking) {
        again = wish;
        return;
      }
      const asked = wish();
      last = asked;
      if (!asked) return;
      asking = true;
      try {
        const answer = await MP.ask("resolve", asked);
        if (last === asked) {
          on.answered({ ...answer, asked });
          if (answer.found && !answer.proven) prove(asked, answer.changed);
        }
      } catch (error) {
        if (last === asked) on.refused(error);
      } finally {
        asking = false;
      }
      const next = again;
      again = null;
      if (next) await ask(next);
    };
    return {
      ask,
      /** Want nothing more: an answer that is on its way is not taken. */
      stop: () => {
        clearTimeout(waiting);
        [again, last] = [null, null];
      },
    };
  };

  /**
   * The file of the plan that is shown: the one that came with the answer, or the same formats solved again.
   * @param {Object} solved answer, with ``choice`` and what was ``asked``
   * @throws where other formats come out now
   */
  MP.solvedPlan = async (solved) => {
    if (solved.plan) return solved.plan;
    const answer = await MP.ask("resolve", { ...solved.asked, whole: true });
    if (!answer.plan || !same(answer.choice, solved.choice)) {
      throw Object.assign(new Error(), { code: "E210", message: "solved again, another plan came out", advice: "move the budget, and save once the plan stays" });
    }
    return answer.plan;
  };
})();
