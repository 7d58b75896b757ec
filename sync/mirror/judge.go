package mirror

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kedge/deployments"
	"kedge/sync/git"
)

// recall reads the commit that the store holds, so that it can be kept up while a newer one is not taken. It is tried again
// with each new head, which may have brought it along.
func (l *leader) recall(head string) {
	if l.accepted != nil || l.written.taken() == "" || l.recalled == head {
		return
	}
	l.recalled = head
	commit, err := l.load(l.written.taken())
	if err != nil {
		l.c.Log.Warn("the commit that was mirrored last can't be read: until there is another, changes by hand stay", "commit", l.written.taken(), "error", err)
		return
	}
	l.accepted = commit
}

// judge decides whether the branch's head becomes the commit to write, and else why not: refused is for good, unsure may pass, and is to be
// judged again after a while.
func (l *leader) judge(ctx context.Context, branch gitState, cells map[deployments.UnitID]cell) (again time.Duration, refused, unsure error) {
	switch {
	case branch.head == "" || l.accepted != nil && branch.head == l.accepted.Hash:
		return 0, nil, nil
	case branch.bad != nil:
		return 0, branch.bad, nil
	}
	m := move{from: l.written.taken(), rules: l.written.Rules, to: branch.good}
	if l.accepted != nil {
		m.from, m.rules = l.accepted.Hash, rulesOf(l.accepted)
		for _, u := range l.accepted.Tree.Units {
			m.had = append(m.had, u.ID)
		}
	} else {
		for id, c := range cells {
			if c.err == nil && ours(c.record) {
				m.had = append(m.had, id)
			}
		}
	}
	if judged := m.from + ".." + branch.head; l.judged != judged {
		if m.from == "" {
			m.rules = rulesOf(branch.good)
		} else {
			var err error
			if m.descends, err = l.descends(ctx, m.from, branch.head); err != nil {
				return settle, nil, fmt.Errorf("history from %s to %s: %w", short(m.from), short(branch.head), err)
			}
		}
		l.judged, l.verdict = judged, refuse(m)
		l.refused(branch.head)
	}
	if l.verdict != nil || l.accepted == branch.good {
		return 0, l.verdict, nil
	}
	done, err := l.inspect(ctx, branch.good)
	switch {
	case errors.As(err, new(deployments.Problems)):
		l.verdict = err
		l.refused(branch.head)
		return 0, err, nil
	case err != nil:
		return l.inspection.wait(time.Now()), nil, fmt.Errorf("commit %s is not taken yet: %w", short(branch.head), err)
	case done:
		l.metrics.judged(nil)
		l.c.Log.Info("the commit is taken", "commit", branch.head, "after", m.from)
		l.accepted = branch.good
		clear(l.ranks) // of units that may be gone
	}
	return 0, nil, nil
}

// refused notes that the commit is not to be taken, where that is the verdict.
func (l *leader) refused(commit string) {
	if l.verdict != nil {
		l.metrics.judged(l.verdict)
		l.c.Log.Error("the commit is refused", "commit", commit, "error", l.verdict)
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

// inspection is a look at a commit's releases, under way or done.
type inspection struct {
	of     string // as leader.judged
	stop   context.CancelFunc
	result chan error // holds one
	ended  time.Time  // zero: it is under way
	next   time.Time  // where it failed: when it is tried again
	err    error      // while it is under way: what the one before it failed with
}

// A release that isn't there, or can't be read, is looked for after patience, and then less and less often, up to maxPatience on average:
// its upload may take long, or never have been meant. A new commit begins anew, and so does a webhook.
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
	l.patience.Reset()
	if i := l.inspection; i != nil && i.failed() {
		if soon := i.ended.Add(l.hookPause); soon.Before(i.next) {
			i.next = soon
		}
	}
}

// inspect looks at what a commit brings, beside the rounds: storage that is slow must not hold up rollouts that are under way. done: it
// was looked at. An error that isn't deployments.Problems may pass, and is looked for again: see patience.
func (l *leader) inspect(ctx context.Context, to *git.Commit) (done bool, err error) {
	last := l.inspection
	if last != nil && last.of != l.judged {
		l.patience.Reset()
	}
	if last != nil && (last.of != l.judged || last.failed() && !time.Now().Before(last.next)) {
		last.stop()
		l.inspection = nil
	}
	if l.inspection == nil {
		var before *deployments.Tree
		if l.accepted != nil {
			before = l.accepted.Tree
		}
		units := changed(before, to.Tree)
		if l.c.Releases.Trust == nil {
			units = bounded(to.Tree.Settings, units)
		}
		if len(units) == 0 {
			return true, nil
		}
		ctx, cancel := context.WithCancel(ctx)
		i := &inspection{of: l.judged, stop: cancel, result: make(chan error, 1)}
		if last != nil && last.of == i.of {
			i.err = last.err
		}
		l.inspection = i
		l.inspecting.Go(func() {
			problems, unread := l.c.Releases.inspect(ctx, to.Tree.Settings, units)
			switch {
			case len(problems) > 0:
				i.result <- problems
			case len(unread) > 0:
				i.result <- errors.New(unread.Error())
			default:
				i.result <- nil
			}
			l.poked()
		})
	}
	i := l.inspection
	select {
	case i.err = <-i.result:
		i.ended = time.Now()
		if i.failed() {
			i.next = i.ended.Add(l.patience.Next())
		}
	default:
	}
	return !i.ended.IsZero(), i.err
}
