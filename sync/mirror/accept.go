package mirror

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/deployments/wait"
	"kedge/sync/git"
	"kedge/sync/mirror/inspect"
)

// acceptor decides which commit the store is to hold. It keeps the commit that the store holds now, and what it knows
// of the candidate to replace that commit.
type acceptor struct {
	follower        *follower
	own             *written
	repo            string // Config.Repo
	override        string // Config.Accept
	releases        inspect.Releases
	hookPause       time.Duration
	metrics         *metrics
	log             *slog.Logger
	inspectionEnded wait.Signal // set when an inspection ends

	commit *git.Commit // the commit that was taken last; nil: none, or it can't be used
	// unvouched is the commit that was taken last if it can be read but its signature no longer counts: see basis.
	unvouched   *git.Commit
	recalled    string // the branch's head when readAccepted last tried to read commit
	checkedPair string // FROM..TO of the last candidate that was checked
	refusal     error  // why that candidate is refused; nil: it isn't

	countedBad string // the last head that was counted as refused because it is invalid or its signature doesn't count

	// acceptedByFlag is the last commit whose history was left unchecked, because Config.Accept names it.
	acceptedByFlag string
	inspection     *inspection // of the candidate's releases; nil: not begun
	releaseRetry   *wait.Backoff
	inspecting     sync.WaitGroup
}

// outcome is the result of accept; zero: there is nothing new, or the check of the head's releases is running.
type outcome struct {
	taken   bool          // the branch's head was taken now
	refused error         // why the head is refused
	unsure  error         // why the head is not taken yet
	retry   time.Duration // if unsure is set: the time after which to check again; 0: once a running check ends
}

// accept decides whether the branch's head becomes the commit to write, and returns why not.
func (a *acceptor) accept(ctx context.Context, branch gitState, cells map[deployments.UnitID]cell) outcome {
	a.readAccepted(cmp.Or(branch.head, "none"))
	switch {
	case branch.head == "" || a.commit != nil && branch.head == a.commit.Hash:
		return outcome{}
	case branch.bad != nil:
		if a.countedBad != branch.head { // the follower logs it
			a.countedBad = branch.head
			a.metrics.countCommit(branch.bad)
		}
		return outcome{refused: branch.bad}
	}
	c := a.candidate(branch.good, cells)
	if pair := c.from + ".." + branch.head; a.checkedPair != pair {
		var err error
		if c.accepted, err = a.accepts(ctx, c); c.accepted {
			a.acceptedByFlag = branch.head
		} else if err == nil && c.from != "" {
			c.descends, err = a.follower.descends(ctx, c.from, branch.head)
		}
		if err != nil {
			err = fmt.Errorf("comparing the histories of %s and %s: %w", short(c.from), short(branch.head), err)
			return outcome{unsure: err, retry: watchLag}
		}
		a.checkedPair, a.refusal = pair, refuse(c)
		a.logRefusal(branch.head)
	}
	if a.refusal != nil || a.commit == branch.good {
		return outcome{refused: a.refusal}
	}
	done, err := a.inspect(ctx, branch.good)
	switch {
	case errors.As(err, new(deployments.Problems)):
		a.refusal = err
		a.logRefusal(branch.head)
		return outcome{refused: err}
	case err != nil:
		err = fmt.Errorf("commit %s is not taken yet: %w", short(branch.head), err)
		return outcome{unsure: err, retry: a.inspection.wait(time.Now())}
	case done:
		a.metrics.countCommit(nil)
		a.log.Info("the commit is taken", "commit", branch.head, "after", c.from)
		a.commit = branch.good
		return outcome{taken: true}
	}
	return outcome{}
}

// readAccepted reads the commit that the store holds, so that the store can be reconciled with it
// until a newer commit is taken. It tries again with each new head, because a fetch may have
// brought the commit.
func (a *acceptor) readAccepted(head string) {
	taken := a.own.state.LastCommit()
	if a.commit != nil || taken == "" || a.recalled == head {
		return
	}
	a.recalled = head
	commit, err := a.follower.loadTaken(taken)
	if err != nil && a.readAcceptedUnsigned(taken, err) {
		return
	}
	if err != nil {
		a.log.Warn("could not read the commit that was mirrored last: rollouts, pins and orders wait until it can be read, "+
			"or a newer commit is taken; bring it back to the branch, or push a commit", "commit", taken, "error", err)
		return
	}
	a.commit = commit
}

// readAcceptedUnsigned sets unvouched to the commit that the store holds, so that orders, pins and
// rollouts go on. It does so only if the commit was refused for nothing but its signature, and
// reports whether that is so.
func (a *acceptor) readAcceptedUnsigned(taken string, refused error) bool {
	if !errors.As(refused, new(*git.BadCommit)) {
		return false
	}
	commit, err := a.follower.loadUnsigned(taken)
	if err != nil {
		return false
	}
	if a.unvouched != nil {
		return true
	}
	a.unvouched = commit
	a.log.Warn("the signature of the commit that was mirrored last no longer counts: orders, pins and rollouts go on, "+
		"but records that were changed by hand stay so until a commit is taken; push one with a valid signature",
		"commit", taken, "error", refused)
	return true
}

// accepts reports whether Config.Accept names the commit in c.to. An ancestor of the store's commit isn't accepted:
// otherwise each force push of it would bring back its old state. A first commit needs no acceptance. An error means
// that the repository can't be read at the moment.
func (a *acceptor) accepts(ctx context.Context, c candidate) (bool, error) {
	if c.to.Hash != a.override || c.from == "" {
		return false, nil
	}
	follows, err := a.follower.descends(ctx, c.to.Hash, c.from)
	if follows || err != nil && !errors.Is(err, git.ErrGap) { // a repository that was replaced lacks the old history
		return false, err
	}
	history := "the commit does not descend from the one that it replaces"
	if err != nil {
		history = err.Error()
	}
	a.log.Warn("--accept names this commit: its history is not checked. Remove that flag once the commit is taken",
		"commit", c.to.Hash, "instead_of", c.from, "history", history)
	return true, nil
}

// candidate returns a candidate for the branch's commit, to, with what refuse needs to know of the commit that the
// store holds. cells are the store's records. The caller sets descends and accepted.
func (a *acceptor) candidate(to *git.Commit, cells map[deployments.UnitID]cell) candidate {
	c := candidate{from: a.own.state.LastCommit(), rules: a.own.state.Rules, to: to}
	if other := a.own.state.Repo; other != a.repo {
		c.otherRepo = other
	}
	had := map[deployments.UnitID]bool{}
	switch last := a.commit; {
	case last != nil:
		c.from, c.rules = last.Hash, rulesOf(last)
		for _, u := range last.Tree.Units {
			had[u.ID] = true
		}
	case c.from == "":
		c.rules = rulesOf(to)
	}
	for id, cell := range cells {
		own, known := a.own.records[id]
		removed := known && own.value == nil // even if the watch has yet to show the removal
		if cell.err == nil && ours(cell.record) && !removed {
			had[id] = true
		}
	}
	c.had = slices.SortedFunc(maps.Keys(had), deployments.UnitID.Compare)
	return c
}

// logRefusal logs and counts the refusal of the commit, if it was refused.
func (a *acceptor) logRefusal(commit string) {
	if err := a.refusal; err != nil {
		a.metrics.countCommit(err)
		a.log.Error("the commit is refused: what was mirrored before stays", "commit", commit, "error", err)
	}
}

// candidate is a commit that might follow the one that the store holds.
type candidate struct {
	// from is the hash of the commit that the store holds; empty: nothing was mirrored yet. had are
	// the units of that commit, if it could be read, and all other units that have records by a
	// mirror.
	from string
	had  []deployments.UnitID
	// otherRepo is the address of the repository that the commit in from comes from; empty: it is
	// the repository of the commit in to, or not known.
	otherRepo string
	// rules are those of the commit in from or, if from is empty, of the commit in to. A commit must not lift the rules
	// that it breaks.
	rules deployments.MirrorRules
	to    *git.Commit
	// descends is set if the commit to descends from the commit from.
	descends bool
	// accepted is as acceptor.accepts returns it. If it is set, descends isn't determined.
	accepted bool
}

// refuse returns why a valid commit must not replace the store's commit; nil: it may. refuse is pure.
func refuse(c candidate) error {
	if c.accepted {
		return nil
	}
	if c.from != "" && !c.descends && c.otherRepo != "" {
		return fmt.Errorf(
			"commit %s does not descend from %s, which was mirrored last, from %s. If two repositories are mirrored to the "+
				"same prefix, give each mirror its own --prefix; if this repository replaced that one, start the mirror "+
				"once with --accept %s",
			short(c.to.Hash),
			short(c.from),
			c.otherRepo,
			c.to.Hash,
		)
	}
	if c.from != "" && !c.descends && !c.rules.AllowRewind {
		return fmt.Errorf(
			"commit %s does not descend from %s, which was mirrored last (a force push?): push a commit on top of that one, "+
				"or set allow_rewind in kedge.yaml before the history is rewritten; or, if the repository was replaced, "+
				"start the mirror once with --accept %s",
			short(c.to.Hash),
			short(c.from),
			c.to.Hash,
		)
	}
	if !c.to.Tree.Settings.Prune {
		return nil // no record is removed
	}
	stays := map[deployments.UnitID]bool{}
	for _, u := range c.to.Tree.Units {
		stays[u.ID] = true
	}
	var removed []string
	for _, id := range c.had {
		if !stays[id] {
			removed = append(removed, id.String())
		}
	}
	slices.Sort(removed)
	for _, stage := range c.to.Tree.Submodules {
		if hidden := below(stage, removed); len(hidden) > 0 {
			return fmt.Errorf(
				"in commit %s %s is a submodule, whose files are not read, and so %s would be removed: keep the unit files "+
					"in the repo itself, or remove them in a commit before this one",
				short(c.to.Hash),
				stage,
				few(hidden),
			)
		}
	}
	switch limit := c.rules.MaxRemoved; {
	case len(removed) <= 1 || limit >= 100: // removing one unit is always allowed
		return nil
	case len(stays) == 0:
		return fmt.Errorf(
			"commit %s has no unit at all, and %d units have records: to remove them all, first push a commit "+
				"that sets max_removed: 100 in kedge.yaml",
			short(c.to.Hash),
			len(c.had),
		)
	case len(removed)*100 > limit*len(c.had):
		return fmt.Errorf(
			"commit %s removes %d of %d units (%s), more than max_removed, which is %d %%: remove fewer at a time, or raise "+
				"it in kedge.yaml in a commit before this one",
			short(c.to.Hash),
			len(removed),
			len(c.had),
			few(removed),
			limit,
		)
	}
	return nil
}

// below returns the units of a stage among names.
func below(stage string, names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !strings.HasPrefix(name, stage+"/") })
}

func short(hash string) string { return safetext.Prefix(hash, 12) }

// few joins the first names of a list, and says how many more there are.
func few(names []string) string {
	const shown = 5
	if len(names) > shown {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), len(names)-shown)
	}
	return strings.Join(names, ", ")
}

func rulesOf(l *git.Commit) deployments.MirrorRules {
	return deployments.MirrorRules{AllowRewind: l.Tree.Settings.AllowRewind, MaxRemoved: l.Tree.Settings.MaxRemoved}
}

// inspection is a check of a commit's releases, running or ended.
type inspection struct {
	of     string // as acceptor.checkedPair
	stop   context.CancelFunc
	result chan error // has room for one
	ended  time.Time  // zero: it is running
	next   time.Time  // if it failed: when it is retried
	err    error      // its result; while it runs, the result of the same commit's last inspection
}

// failed reports whether the inspection ended because releases could not be read, so that it is to be retried. Problems
// that it found are a result, not a failure.
func (i *inspection) failed() bool {
	return !i.ended.IsZero() && i.err != nil && !errors.As(i.err, new(deployments.Problems))
}

// wait returns the time until a failed inspection is retried; 0: it is running, or didn't fail.
func (i *inspection) wait(now time.Time) time.Duration {
	if !i.failed() {
		return 0
	}
	return max(time.Millisecond, i.next.Sub(now))
}

// recheckSoon resets the backoff of failed inspections. If the last inspection failed, it is retried once hookPause has
// passed since its end, unless it is due earlier.
func (a *acceptor) recheckSoon() {
	a.releaseRetry.Reset()
	if i := a.inspection; i != nil && i.failed() {
		if soon := i.ended.Add(a.hookPause); soon.Before(i.next) {
			i.next = soon
		}
	}
}

// inspect checks the releases that a commit introduces, or for whose stage it changes the bounds.
// The check runs beside the rounds, as slow storage must not hold up rollouts under way. done
// reports whether the check has ended; until then err is the result of the same commit's last
// check. After an error other than deployments.Problems the check is retried: see releaseRetry.
func (a *acceptor) inspect(ctx context.Context, to *git.Commit) (done bool, err error) {
	last := a.inspection
	if last != nil && last.of != a.checkedPair {
		a.releaseRetry.Reset()
	}
	if last != nil && (last.of != a.checkedPair || last.failed() && !time.Now().Before(last.next)) {
		last.stop()
		a.inspection = nil
	}
	if a.inspection == nil {
		var before *deployments.Tree
		if a.commit != nil {
			before = a.commit.Tree
		}
		units := inspect.Changed(before, to.Tree)
		if a.releases.Trust == nil {
			units = inspect.Bounded(to.Tree.Settings, units)
		}
		if len(units) == 0 {
			return true, nil
		}
		ctx, cancel := context.WithCancel(ctx)
		i := &inspection{of: a.checkedPair, stop: cancel, result: make(chan error, 1)}
		if last != nil && last.of == i.of {
			i.err = last.err
		}
		a.inspection = i
		a.inspecting.Go(func() {
			problems, unread := a.releases.Inspect(ctx, to.Tree.Settings, units)
			switch {
			case len(problems) > 0:
				i.result <- problems
			case len(unread) > 0:
				i.result <- errors.New(unread.Error())
			default:
				i.result <- nil
			}
			a.inspectionEnded.Set()
		})
	}
	i := a.inspection
	select {
	case i.err = <-i.result:
		i.ended = time.Now()
		if i.failed() {
			i.next = i.ended.Add(a.releaseRetry.Next())
		}
	default:
	}
	return !i.ended.IsZero(), i.err
}

// basis returns the commit that the store is reconciled with, nil if none is known. vouched reports whether the
// commit's signature counts or is not required. If vouched isn't set, the commit is as recorded returns it.
func (a *acceptor) basis(cells map[deployments.UnitID]cell) (commit *git.Commit, vouched bool) {
	switch {
	case a.commit != nil:
		return a.commit, true
	case a.unvouched != nil:
		return recorded(a.unvouched, cells, a.own.records), false
	}
	return nil, false
}

// recorded returns the commit with only those units that have a record by a mirror, not orphaned, about the release
// that the commit names. Each unit's After, Drift and Adopt come from its record, not from its file. So the commit
// needs no valid signature: it tells nodes nothing new, and only says how rollouts go on. recorded is pure.
func recorded(
	commit *git.Commit,
	cells map[deployments.UnitID]cell,
	own map[deployments.UnitID]writtenRecord,
) *git.Commit {
	kept := *commit
	tree := *commit.Tree
	kept.Tree, tree.Units = &tree, nil
	for _, u := range commit.Tree.Units {
		c, mine := cells[u.ID], own[u.ID]
		record, present := c.record, c.present && c.err == nil
		if mine.value != nil {
			record, present = mine.record, true
		}
		if !present || !ours(record) || record.Orphaned || !concerns(record, u.Release) {
			continue
		}
		u.After, u.Drift, u.Adopt = record.After, record.Drift, record.Adopt
		tree.Units = append(tree.Units, u)
	}
	return &kept
}

// concerns reports whether a record is about a release that Git names: as its target, as the release that it rolls
// back, or as the one that waits for that. For a pinned record, it looks at what the pin replaced.
func concerns(r deployments.Record, release deployments.Pointer) bool {
	if r.Rollout.WaitsForRollback() && r.Rollout.Next == release {
		return true
	}
	if r.Pinned != nil {
		return r.Pinned.Target == release || !r.Pinned.Failed.IsZero() && r.Pinned.Failed == release.Digest
	}
	return goal(r, release) == release
}

// CheckPush is a pre-receive hook: it reads "OLD NEW REF" lines from stdin, as described in
// githooks(5). It returns an error for what the mirror would not take: an invalid tree, a history
// rewritten without allow_rewind, the removal of too many units, the removal of the branch. If
// releases is set, it also returns the problems that releases.Check finds with the releases that
// the push changes.
//
// Only the given branches are checked, by default main and the one that HEAD names. Signatures
// aren't checked. path is as Config.Path. CheckPush runs in the receiving repository's environment,
// where pushed objects are in a quarantine.
func CheckPush(
	ctx context.Context,
	repoDir, path string,
	stdin io.Reader,
	releases *inspect.Releases,
	branches ...string,
) error {
	from, likely, err := git.OpenReceiving(repoDir, path, os.Getenv)
	if err != nil {
		return err
	}
	defer from.Close()
	if len(branches) == 0 {
		branches = likely
	}
	updates, err := git.ReadUpdates(stdin)
	refusals := []error{err}
	for _, u := range updates {
		if !slices.Contains(branches, u.Branch) {
			continue
		}
		if err := checkUpdate(ctx, from, releases, u); err != nil {
			refusals = append(refusals, fmt.Errorf("branch %s is not updated:\n%w", u.Branch, err))
		}
	}
	return errors.Join(refusals...)
}

// checkUpdate returns why a branch's update is refused; nil: it is not.
func checkUpdate(ctx context.Context, from *git.Objects, releases *inspect.Releases, u git.Update) error {
	if u.New == "" {
		return errors.New("the mirror follows this branch, so it can't be removed")
	}
	to, err := from.Load(u.New, nil)
	if err != nil {
		return err
	}
	var before *deployments.Tree // nil: no earlier tree sets rules or has checked releases
	if u.Old != "" {
		last, err := from.Load(u.Old, nil)
		switch {
		case errors.As(err, new(*git.BadCommit)): // the mirror didn't take it
		case err != nil:
			return err
		default:
			before = last.Tree
			m := candidate{from: last.Hash, rules: rulesOf(last), to: to}
			for _, u := range before.Units {
				m.had = append(m.had, u.ID)
			}
			if m.descends, err = from.Descends(ctx, u.Old, u.New); err != nil {
				return err
			}
			if err := refuse(m); err != nil {
				return err
			}
		}
	}
	if releases == nil {
		return nil
	}
	tree := *to.Tree
	tree.Units = inspect.Changed(before, to.Tree)
	return releases.Check(ctx, &tree)
}
