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
	"kedge/deployments/wait"
	"kedge/sync/git"
	"kedge/sync/mirror/inspect"
)

// acceptor decides which commit the store is to hold: it knows which one it holds, and what is known of the one that
// might follow it.
type acceptor struct {
	branch    *follower
	own       *written
	repo      string // Config.Repo
	override  string // Config.Accept
	releases  inspect.Releases
	hookPause time.Duration
	metrics   *metrics
	log       *slog.Logger
	inspected wait.Signal // set when an inspection has ended

	commit *git.Commit // nil: it can't be read
	// unvouched is the store's commit, where it can be read, and its signature counts no more; for basis alone.
	unvouched *git.Commit
	recalled  string // the branch's head when commit was last looked for
	compared  string // FROM..TO of the candidate that was last judged
	refusal   error  // why that one isn't taken; nil: it is

	overruled  string      // the commit that is taken because Config.Accept names it
	inspection *inspection // of the candidate's releases; nil: none was needed yet
	patience   *wait.Backoff
	inspecting sync.WaitGroup
}

// outcome is the result of accept.
type outcome struct {
	taken   bool          // it was taken just now
	refused error         // why it is not taken, for good
	unsure  error         // why it is not taken yet
	retry   time.Duration // when unsure is to be judged again
}

// accept decides whether the branch's head becomes the commit to write, and else why not.
func (a *acceptor) accept(ctx context.Context, branch gitState, cells map[deployments.UnitID]cell) outcome {
	a.recall(cmp.Or(branch.head, "none"))
	switch {
	case branch.head == "" || a.commit != nil && branch.head == a.commit.Hash:
		return outcome{}
	case branch.bad != nil:
		return outcome{refused: branch.bad}
	}
	c := a.candidate(branch.good, cells)
	if compared := c.from + ".." + branch.head; a.compared != compared {
		if c.accepted = a.accepts(ctx, c); c.accepted {
			a.overruled = branch.head
		} else if c.from != "" {
			var err error
			if c.descends, err = a.branch.descends(ctx, c.from, branch.head); err != nil {
				err = fmt.Errorf("history from %s to %s: %w", short(c.from), short(branch.head), err)
				return outcome{unsure: err, retry: watchLag}
			}
		}
		a.compared, a.refusal = compared, refuse(c)
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
		a.metrics.judged(nil)
		a.log.Info("the commit is taken", "commit", branch.head, "after", c.from)
		a.commit = branch.good
		return outcome{taken: true}
	}
	return outcome{}
}

// recall reads the commit that the store holds, so that it can be kept up while a newer one is not taken. It is tried
// again with each new head, which may have brought it along.
func (a *acceptor) recall(head string) {
	taken := a.own.state.Taken()
	if a.commit != nil || taken == "" || a.recalled == head {
		return
	}
	a.recalled = head
	commit, err := a.branch.loadTaken(taken)
	if err != nil && a.recallUnvouched(taken, err) {
		return
	}
	if err != nil {
		a.log.Warn("the commit that was mirrored last can't be read: until there is another, changes by hand stay",
			"commit", taken, "error", err)
		return
	}
	a.commit = commit
}

// recallUnvouched reads the commit that the store holds, for orders, where refused is about its signature alone.
func (a *acceptor) recallUnvouched(taken string, refused error) bool {
	if !errors.As(refused, new(*git.BadCommit)) {
		return false
	}
	commit, err := a.branch.loadUnvouched(taken)
	if err != nil {
		return false
	}
	if a.unvouched != nil {
		return true
	}
	a.unvouched = commit
	a.log.Warn("the commit that was mirrored last bears no signature that counts any more: orders, pins and rollouts "+
		"go on, and changes by hand stay until a commit is taken", "commit", taken, "error", refused)
	return true
}

// accepts reports whether an operator said to take the commit. One that the store's own follows was taken before:
// to take it again would bring back what is old, each time that somebody forces a push of it.
func (a *acceptor) accepts(ctx context.Context, c candidate) bool {
	if c.to.Hash != a.override || c.from == "" {
		return false
	}
	follows, err := a.branch.descends(ctx, c.to.Hash, c.from)
	if follows { // an error says that the store's commit isn't in this repository
		return false
	}
	a.log.Warn("the commit is taken whatever its history, as --accept says: leave that out from now on",
		"commit", c.to.Hash, "instead_of", c.from, "history", err)
	return true
}

// candidate compares a commit with what the store holds.
func (a *acceptor) candidate(to *git.Commit, cells map[deployments.UnitID]cell) candidate {
	c := candidate{from: a.own.state.Taken(), rules: a.own.state.Rules, to: to}
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
		removed := known && own.value == nil // which the watch has yet to show
		if cell.err == nil && ours(cell.record) && !removed {
			had[id] = true
		}
	}
	c.had = slices.SortedFunc(maps.Keys(had), deployments.UnitID.Compare)
	return c
}

// logRefusal notes that the commit is not taken, if it isn't.
func (a *acceptor) logRefusal(commit string) {
	if err := a.refusal; err != nil {
		a.metrics.judged(err)
		a.log.Error("the commit is refused", "commit", commit, "error", err)
	}
}

// candidate is a commit that might follow the one that the store holds.
type candidate struct {
	// from is the hash of the commit that the store holds; empty: nothing was mirrored yet. had are its units, and those
	// that it names no longer and whose records are there.
	from string
	had  []deployments.UnitID
	// otherRepo is the address of the repository that from was mirrored from, if it is another than to's.
	otherRepo string
	// rules are those of from, where there is one: a commit must not lift the rules that it breaks.
	rules deployments.MirrorRules
	to    *git.Commit
	// descends is whether from is among to's ancestors.
	descends bool
	// accepted is whether an operator said to take it.
	accepted bool
}

// refuse returns why a valid commit isn't taken all the same; nil: it is. Pure.
func refuse(c candidate) error {
	if c.accepted {
		return nil
	}
	if c.from != "" && !c.descends && c.otherRepo != "" {
		return fmt.Errorf(
			"commit %s does not descend from %s, which was mirrored last, from %s: where two mirrors of two repositories share "+
				"the store's prefix, give each its own --prefix; where that repository was replaced by this one, start the mirror "+
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
				"or set allow_rewind in kedge.yaml before the history is rewritten; or, where the repository was replaced, "+
				"start the mirror once with --accept %s",
			short(c.to.Hash),
			short(c.from),
			c.to.Hash,
		)
	}
	if !c.to.Tree.Settings.Prune {
		return nil // no record goes
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
	switch limit := c.rules.MaxRemoved; {
	case len(removed) <= 1 || limit >= 100: // one is what people mean, and there is no smaller step
		return nil
	case len(stays) == 0:
		return fmt.Errorf(
			"commit %s has no unit at all, and %d have records: to remove them all, set max_removed: 100 in kedge.yaml in a "+
				"commit before it",
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

func short(hash string) string { return hash[:min(12, len(hash))] }

// few names the first of many.
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

// inspection is a look at a commit's releases, under way or done.
type inspection struct {
	of     string // as acceptance.compared
	stop   context.CancelFunc
	result chan error // holds one
	ended  time.Time  // zero: it is under way
	next   time.Time  // where it failed: when it is tried again
	err    error      // while it is under way: what the one before it failed with
}

// failed: it ended, and told nothing.
func (i *inspection) failed() bool {
	return !i.ended.IsZero() && i.err != nil && !errors.As(i.err, new(deployments.Problems))
}

// wait is how long a look that failed is left alone; 0: another is under way.
func (i *inspection) wait(now time.Time) time.Duration {
	if !i.failed() {
		return 0
	}
	return max(time.Millisecond, i.next.Sub(now))
}

// hurried looks for what wasn't there as if it had just been found missing for the first time.
func (a *acceptor) hurried() {
	a.patience.Reset()
	if i := a.inspection; i != nil && i.failed() {
		if soon := i.ended.Add(a.hookPause); soon.Before(i.next) {
			i.next = soon
		}
	}
}

// inspect looks at what a commit brings, beside the rounds: storage that is slow must not hold up rollouts that are
// under way. done: it was looked at. An error that isn't deployments.Problems may pass, and is looked for again:
// see patience.
func (a *acceptor) inspect(ctx context.Context, to *git.Commit) (done bool, err error) {
	last := a.inspection
	if last != nil && last.of != a.compared {
		a.patience.Reset()
	}
	if last != nil && (last.of != a.compared || last.failed() && !time.Now().Before(last.next)) {
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
		i := &inspection{of: a.compared, stop: cancel, result: make(chan error, 1)}
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
			a.inspected.Set()
		})
	}
	i := a.inspection
	select {
	case i.err = <-i.result:
		i.ended = time.Now()
		if i.failed() {
			i.next = i.ended.Add(a.patience.Next())
		}
	default:
	}
	return !i.ended.IsZero(), i.err
}

// basis returns the commit that the store is kept up by; vouched is whether its signature counted. Nil: none is known.
func (a *acceptor) basis(cells map[deployments.UnitID]cell) (commit *git.Commit, vouched bool) {
	switch {
	case a.commit != nil:
		return a.commit, true
	case a.unvouched != nil:
		return recorded(a.unvouched, cells, a.own.records), false
	}
	return nil, false
}

// recorded returns the commit with those units alone whose records are about the releases that it names, and with what
// the records say in place of what their files say. So nobody's signature is needed for it: it gives nodes nothing that
// the store doesn't say already, and tells only how rollouts go on. Pure.
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
		if !present || !ours(record) || record.Orphaned || !isAbout(record, u.Release) {
			continue
		}
		u.After, u.Drift, u.Adopt = record.After, record.Drift, record.Adopt
		tree.Units = append(tree.Units, u)
	}
	return &kept
}

// isAbout reports whether a record stands for a release that Git names: as its target, as what was rolled back, or as
// what its pin took the place of.
func isAbout(r deployments.Record, release deployments.Pointer) bool {
	if r.Pinned != nil {
		return r.Pinned.Target == release || !r.Pinned.Failed.IsZero() && r.Pinned.Failed == release.Digest
	}
	return goal(r, release) == release
}

// CheckPush is a pre-receive hook: it reads "OLD NEW REF" lines from stdin, as githooks(5) gives them, and refuses
// what the mirror would not take: an invalid tree, a rewritten history, a removal of too many units, the removal of
// the branch. Only branches are looked at: those given, or else main and the one that HEAD names. path is as
// Config.Path. With releases it refuses as well what their Check says of those that the push changes. It runs in
// the receiving repository's environment, where pushed objects lie in a quarantine.
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

// checkUpdate checks one branch's move.
func checkUpdate(ctx context.Context, from *git.Objects, releases *inspect.Releases, u git.Update) error {
	if u.New == "" {
		return errors.New("it is what the mirror follows, and can't be removed")
	}
	to, err := from.Load(u.New, nil)
	if err != nil {
		return err
	}
	var before *deployments.Tree // nil: there is none that sets rules, or has releases that were looked at
	if u.Old != "" {
		last, err := from.Load(u.Old, nil)
		switch {
		case errors.As(err, new(*git.BadCommit)): // it was not taken
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
