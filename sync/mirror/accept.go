package mirror

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/sync/git"
)

// acceptance is which commit the store holds, or is to hold, and what is known of the one that might follow it.
type acceptance struct {
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
	refused error         // why it is not taken, for good
	unsure  error         // why it is not taken yet
	retry   time.Duration // when unsure is to be judged again
}

// accept decides whether the branch's head becomes the commit to write, and else why not.
func (l *leader) accept(ctx context.Context, branch gitState, cells map[deployments.UnitID]cell) outcome {
	l.recall(cmp.Or(branch.head, "none"))
	a := &l.acceptance
	switch {
	case branch.head == "" || a.commit != nil && branch.head == a.commit.Hash:
		return outcome{}
	case branch.bad != nil:
		return outcome{refused: branch.bad}
	}
	c := l.candidate(branch.good, cells)
	if compared := c.from + ".." + branch.head; a.compared != compared {
		if c.accepted = l.accepts(ctx, c); c.accepted {
			a.overruled = branch.head
		} else if c.from != "" {
			var err error
			if c.descends, err = l.descends(ctx, c.from, branch.head); err != nil {
				err = fmt.Errorf("history from %s to %s: %w", short(c.from), short(branch.head), err)
				return outcome{unsure: err, retry: watchLag}
			}
		}
		a.compared, a.refusal = compared, refuse(c)
		l.logRefusal(branch.head)
	}
	if a.refusal != nil || a.commit == branch.good {
		return outcome{refused: a.refusal}
	}
	done, err := l.inspect(ctx, branch.good)
	switch {
	case errors.As(err, new(deployments.Problems)):
		a.refusal = err
		l.logRefusal(branch.head)
		return outcome{refused: err}
	case err != nil:
		err = fmt.Errorf("commit %s is not taken yet: %w", short(branch.head), err)
		return outcome{unsure: err, retry: a.inspection.wait(time.Now())}
	case done:
		l.metrics.judged(nil)
		l.c.Log.Info("the commit is taken", "commit", branch.head, "after", c.from)
		a.commit = branch.good
		clear(l.ranks) // of units that may be gone
	}
	return outcome{}
}

// recall reads the commit that the store holds, so that it can be kept up while a newer one is not taken. It is tried
// again with each new head, which may have brought it along.
func (l *leader) recall(head string) {
	a, taken := &l.acceptance, l.written.state.Taken()
	if a.commit != nil || taken == "" || a.recalled == head {
		return
	}
	a.recalled = head
	commit, err := l.loadTaken(taken)
	if err != nil && l.recallUnvouched(taken, err) {
		return
	}
	if err != nil {
		l.c.Log.Warn("the commit that was mirrored last can't be read: until there is another, changes by hand stay",
			"commit", taken, "error", err)
		return
	}
	a.commit = commit
}

// accepts reports whether an operator said to take the commit. One that the store's own follows was taken before:
// to take it again would bring back what is old, each time that somebody forces a push of it.
func (l *leader) accepts(ctx context.Context, c candidate) bool {
	if c.to.Hash != l.c.Accept || c.from == "" {
		return false
	}
	follows, err := l.descends(ctx, c.to.Hash, c.from)
	if follows { // an error says that the store's commit isn't in this repository
		return false
	}
	l.c.Log.Warn("the commit is taken whatever its history, as --accept says: leave that out from now on",
		"commit", c.to.Hash, "instead_of", c.from, "history", err)
	return true
}

// candidate compares a commit with what the store holds.
func (l *leader) candidate(to *git.Commit, cells map[deployments.UnitID]cell) candidate {
	c := candidate{from: l.written.state.Taken(), rules: l.written.state.Rules, to: to}
	if other := l.written.state.Repo; other != l.c.Repo {
		c.otherRepo = other
	}
	had := map[deployments.UnitID]bool{}
	switch last := l.acceptance.commit; {
	case last != nil:
		c.from, c.rules = last.Hash, rulesOf(last)
		for _, u := range last.Tree.Units {
			had[u.ID] = true
		}
	case c.from == "":
		c.rules = rulesOf(to)
	}
	for id, cell := range cells {
		own, known := l.written.records[id]
		removed := known && own.value == nil // which the watch has yet to show
		if cell.err == nil && ours(cell.record) && !removed {
			had[id] = true
		}
	}
	c.had = slices.SortedFunc(maps.Keys(had), deployments.UnitID.Compare)
	return c
}

// logRefusal notes that the commit is not taken, if it isn't.
func (l *leader) logRefusal(commit string) {
	if err := l.acceptance.refusal; err != nil {
		l.metrics.judged(err)
		l.c.Log.Error("the commit is refused", "commit", commit, "error", err)
	}
}

func (l *leader) descends(ctx context.Context, from, to string) (bool, error) {
	in, err := l.branch.Objects()
	if err != nil {
		return false, err
	}
	defer in.Close()
	return in.Descends(ctx, from, to)
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
				"the store's prefix, give each its own --prefix; where that repository was replaced by this one, start the mirror once with --accept %s",
			short(c.to.Hash),
			short(c.from),
			c.otherRepo,
			c.to.Hash,
		)
	}
	if c.from != "" && !c.descends && !c.rules.AllowRewind {
		return fmt.Errorf(
			"commit %s does not descend from %s, which was mirrored last (a force push?): push a commit on top of that one, "+
				"or set allow_rewind in kedge.yaml before the history is rewritten; or, where the repository was replaced, start the mirror once "+
				"with --accept %s",
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
			"commit %s removes %d of %d units (%s), more than max_removed, which is %d %%: remove fewer at a time, or raise it in "+
				"kedge.yaml in a commit before this one",
			short(c.to.Hash),
			len(removed),
			len(c.had),
			few(removed),
			limit,
		)
	}
	return nil
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

// A release that isn't there, or can't be read, is looked for after patience, and then less and less often, up to
// maxPatience on average: its upload may take long, or never have been meant. A new commit begins anew, and so does
// a webhook.
const (
	patience    = 5 * time.Second
	maxPatience = time.Minute
)

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
func (l *leader) hurried() {
	l.acceptance.patience.Reset()
	if i := l.acceptance.inspection; i != nil && i.failed() {
		if soon := i.ended.Add(l.hookPause); soon.Before(i.next) {
			i.next = soon
		}
	}
}

// inspect looks at what a commit brings, beside the rounds: storage that is slow must not hold up rollouts that are
// under way. done: it was looked at. An error that isn't deployments.Problems may pass, and is looked for again:
// see patience.
func (l *leader) inspect(ctx context.Context, to *git.Commit) (done bool, err error) {
	last := l.acceptance.inspection
	if last != nil && last.of != l.acceptance.compared {
		l.acceptance.patience.Reset()
	}
	if last != nil && (last.of != l.acceptance.compared || last.failed() && !time.Now().Before(last.next)) {
		last.stop()
		l.acceptance.inspection = nil
	}
	if l.acceptance.inspection == nil {
		var before *deployments.Tree
		if l.acceptance.commit != nil {
			before = l.acceptance.commit.Tree
		}
		units := changed(before, to.Tree)
		if l.c.Releases.Trust == nil {
			units = bounded(to.Tree.Settings, units)
		}
		if len(units) == 0 {
			return true, nil
		}
		ctx, cancel := context.WithCancel(ctx)
		i := &inspection{of: l.acceptance.compared, stop: cancel, result: make(chan error, 1)}
		if last != nil && last.of == i.of {
			i.err = last.err
		}
		l.acceptance.inspection = i
		l.acceptance.inspecting.Go(func() {
			problems, unread := l.c.Releases.inspect(ctx, to.Tree.Settings, units)
			switch {
			case len(problems) > 0:
				i.result <- problems
			case len(unread) > 0:
				i.result <- errors.New(unread.Error())
			default:
				i.result <- nil
			}
			l.observer.changed.Set()
		})
	}
	i := l.acceptance.inspection
	select {
	case i.err = <-i.result:
		i.ended = time.Now()
		if i.failed() {
			i.next = i.ended.Add(l.acceptance.patience.Next())
		}
	default:
	}
	return !i.ended.IsZero(), i.err
}

// loadUnvouched reads the commit that was mirrored last though its signature doesn't count, and nothing remembers that
// it once did: its signer was taken out, and this mirror has no cache from before. The store says which commit that
// was, and is no proof: see recorded.
func (m *Mirror) loadUnvouched(hash string) (*git.Commit, error) {
	from, err := m.branch.Objects()
	if err != nil {
		return nil, err
	}
	defer from.Close()
	return from.LoadTaken(hash, nil)
}

// recallUnvouched reads the commit that the store holds, for orders, where refused is about its signature alone.
func (l *leader) recallUnvouched(taken string, refused error) bool {
	if !errors.As(refused, new(*git.BadCommit)) {
		return false
	}
	commit, err := l.loadUnvouched(taken)
	if err != nil {
		return false
	}
	if l.acceptance.unvouched != nil {
		return true
	}
	l.acceptance.unvouched = commit
	l.c.Log.Warn("the commit that was mirrored last bears no signature that counts any more: orders, pins and rollouts "+
		"go on, and changes by hand stay until a commit is taken", "commit", taken, "error", refused)
	return true
}

// basis returns the commit that the store is kept up by; vouched is whether its signature counted. Nil: none is known.
func (l *leader) basis(cells map[deployments.UnitID]cell) (commit *git.Commit, vouched bool) {
	switch a := &l.acceptance; {
	case a.commit != nil:
		return a.commit, true
	case a.unvouched != nil:
		return recorded(a.unvouched, cells, l.written.records), false
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
