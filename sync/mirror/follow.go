package mirror

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	"kedge/deployments/wait"
	"kedge/sync/git"
)

// follower follows the branch in Git, whether or not its mirror holds the lease.
type follower struct {
	source       git.Branch
	repo, branch string       // as in Config, for the log
	signers      *git.Signers // nil: signatures are not required
	metrics      *metrics
	log          *slog.Logger
	pollNow      wait.Signal // makes run poll now

	gaps map[question]*gap // what descends could not answer; only descends uses it

	mu      sync.Mutex
	now     gitState
	changed chan struct{} // closed and replaced when now changes
}

// question asks whether the commit to descends from the commit from.
type question struct{ from, to string }

// gap is the state of a question that the repository can't answer, as its history has a gap.
type gap struct {
	pauses   *wait.Backoff
	readAnew time.Time // when the repository may next be fetched anew for the question
	asked    time.Time // when descends was last asked
}

// firstGap and longestGap are the shortest and the longest average time between two fetches of a repository whose
// history has a gap. Each such fetch is of the whole repository.
const (
	firstGap   = 2 * time.Second
	longestGap = 10 * time.Minute
)

// run follows the branch until ctx ends.
func (f *follower) run(ctx context.Context) {
	retry := wait.NewBackoff(100*time.Millisecond, 30*time.Second)
	for ctx.Err() == nil {
		before, began := f.state(), time.Now()
		after := f.readBranch(ctx, before)
		if ctx.Err() != nil {
			return
		}
		f.set(after)
		f.logChange(before, after)
		delay := wait.Jitter(f.source.Interval(), 0.2)
		switch {
		case after.away == nil:
			retry.Reset()
		case errors.Is(after.away, git.ErrNoBranch): // nothing changes until somebody pushes
		default:
			delay = retry.Next()
		}
		select {
		case <-ctx.Done():
		case <-f.pollNow.C():
			if err := wait.For(ctx, f.source.Pause()-time.Since(began)); err != nil {
				return
			}
		case <-time.After(delay):
		}
	}
}

// readBranch reads the branch and returns its state; was is the state as last read. It loads the
// head's commit if the commit is new or was bad. If Git can't be read, it returns was with the
// error as away.
func (f *follower) readBranch(ctx context.Context, was gitState) gitState {
	head, err := f.source.Head(ctx)
	if bad := (*git.BadCommit)(nil); errors.As(err, &bad) {
		f.metrics.countPoll(nil)
		return gitState{head: bad.Hash, bad: err}
	}
	f.metrics.countPoll(err)
	if err != nil {
		was.away = err
		return was
	}
	if was.head == head && was.bad == nil { // a bad commit is loaded again: the signers' file may have changed
		was.away = nil
		return was
	}
	commit, err := f.load(head)
	switch {
	case errors.As(err, new(*git.BadCommit)):
		return gitState{head: head, bad: err}
	case err != nil:
		f.source.Distrust()
		was.away = err
		return was
	}
	return gitState{head: head, good: commit}
}

func (f *follower) load(hash string) (*git.Commit, error) {
	return f.read(func(from *git.Objects) (*git.Commit, error) { return from.Load(hash, f.signers) })
}

// loadTaken reads a commit that a mirror took before. Its signature must be valid now or at the commit's time, or be
// one that this mirror's cache remembers, as after its signer was removed.
func (f *follower) loadTaken(hash string) (*git.Commit, error) {
	return f.read(func(from *git.Objects) (*git.Commit, error) { return from.LoadTaken(hash, f.signers) })
}

// loadUnsigned reads the commit that was mirrored last although its signature isn't valid. This is for a signer that
// was removed, if this mirror has no cache that remembers the signature. That the store names the commit doesn't prove
// that it was signed: see recorded.
func (f *follower) loadUnsigned(hash string) (*git.Commit, error) {
	return f.read(func(from *git.Objects) (*git.Commit, error) { return from.LoadTaken(hash, nil) })
}

func (f *follower) read(load func(*git.Objects) (*git.Commit, error)) (*git.Commit, error) {
	from, err := f.source.Objects()
	if err != nil {
		return nil, err
	}
	defer from.Close()
	return load(from)
}

// descends reports whether the commit to descends from the commit from. If the repository lacks
// commits between them, the error wraps git.ErrGap. A later call may have the repository fetched
// anew, as somebody may have completed the history on the server, which moves no branch.
func (f *follower) descends(ctx context.Context, from, to string) (bool, error) {
	in, err := f.source.Objects()
	if err != nil {
		return false, err
	}
	defer in.Close()
	descends, err := in.Descends(ctx, from, to)
	asked := question{from, to}
	if !errors.Is(err, git.ErrGap) {
		delete(f.gaps, asked)
		return descends, err
	}
	now := time.Now()
	maps.DeleteFunc(f.gaps, func(_ question, g *gap) bool { return now.Sub(g.asked) > 2*longestGap })
	g := f.gaps[asked]
	switch {
	case g == nil:
		g = &gap{pauses: wait.NewBackoff(firstGap, longestGap)}
		g.readAnew = now.Add(g.pauses.Next())
		f.gaps[asked] = g
	case now.After(g.readAnew):
		f.source.Distrust()
		f.pollNow.Set()
		g.readAnew = now.Add(g.pauses.Next())
	}
	g.asked = now
	return descends, err
}

func (f *follower) logChange(before, after gitState) {
	switch {
	case after.away != nil && before.away == nil:
		f.log.Warn("could not read Git: trying again, and what was mirrored stays", "repo", f.repo, "branch", f.branch,
			"error", after.away)
	case after.away == nil && before.away != nil:
		f.log.Info("reading Git works now", "repo", f.repo, "head", after.head)
	}
	if after.head == before.head {
		return
	}
	if after.bad != nil {
		f.log.Error("the commit is refused: what was mirrored before stays", "commit", after.head, "error", after.bad)
		return
	}
	f.log.Info("commit read", "commit", after.head, "author", after.good.Author, "subject", after.good.Subject,
		"units", len(after.good.Tree.Units))
}

func (f *follower) state() gitState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *follower) set(s gitState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	same := s.head == f.now.head && s.good == f.now.good && text(s.bad) == text(f.now.bad) &&
		text(s.away) == text(f.now.away)
	f.now = s
	if !same {
		close(f.changed)
		f.changed = make(chan struct{})
	}
}

// awaitChange returns the state, and a channel that is closed at its next change.
func (f *follower) awaitChange() (gitState, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now, f.changed
}
