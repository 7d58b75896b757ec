package mirror

import (
	"context"
	"errors"
	"time"

	"kedge/deployments"
	"kedge/sync/git"
)

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
