package fleet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// ErrRefused means that waiting longer would not help: the mirror refused the commit, a node refused its release,
// or a rollout was rolled back.
var ErrRefused = errors.New("refused")

// WaitOptions are the options of Wait.
type WaitOptions struct {
	// Commit is the hash of a commit, or its first seven or more digits. Wait then also waits until the mirror has taken
	// this commit or a later one. Empty: it waits for no commit.
	Commit string
	// Push makes Wait ignore the units that Commit is known not to have changed, even if they aren't converged.
	Push bool
	// Patience is how long the store may stay unreachable before Wait gives up; 0: for ever.
	Patience time.Duration
	// Progress, if not nil, is called with what is missing whenever that changes.
	Progress func(missing string)
}

// Wait waits until all live nodes of the selected units run what they should, and no rollout is under way.
//
// An error that wraps ErrRefused means that waiting longer can't help. One that wraps kv.ErrUnavailable means that the
// store was unreachable for longer than opt.Patience. If ctx ends, the error says what was still missing, and wraps
// ctx.Err(). It is an error, too, if opt.Commit is no hash, or if Git has no unit that filter selects once that commit
// is taken.
func Wait(ctx context.Context, store kv.Store, filter Filter, opt WaitOptions) error {
	w := waiter{filter: filter, commit: strings.ToLower(opt.Commit), push: opt.Push,
		sinceBeforeOrder: map[waitKey]time.Time{}}
	if w.commit != "" {
		if err := CheckCommit(w.commit); err != nil {
			return err
		}
	}
	missing, reason, last := "nothing could be read yet", "nothing could be read yet", ""
	progress := func() {
		if opt.Progress != nil && missing != last {
			last = missing
			opt.Progress(missing)
		}
	}
	var result error
	var done, away = errors.New("done"), errors.New("away")
	watching, finish := context.WithCancelCause(ctx)
	defer finish(nil)
	w.outage = newOutage(opt.Patience, func() { finish(away) })
	defer w.outage.end()
	historyRead := w.commit == ""
	err := Watch(watching, store, filter, func(f *Fleet) {
		if parts, why := unavailablePrefixes(f); len(parts) == len(kinds) {
			w.outage.begin()
			missing, reason = "the store is unavailable: "+why, why
			progress()
			return
		}
		w.outage.end()
		if !historyRead {
			missing = "reading the history"
			w.taken, historyRead = w.wasTaken(watching, store, func(unread error) {
				missing = unread.Error()
				progress()
			})
			if !historyRead {
				return
			}
		}
		missing, result = w.check(f)
		if missing == "" || result != nil {
			// The parts of a watched fleet arrive separately, so changes by a new head or an order may be missing. So confirm
			// reads the fleet once more, in the order of kinds.
			missing, result = w.confirm(watching, store, filter)
		}
		if missing == "" || result != nil {
			finish(done)
			return
		}
		progress()
	})
	switch {
	case context.Cause(watching) == done:
		return result
	case context.Cause(watching) == away:
		return fmt.Errorf("%w for %s: %s", kv.ErrUnavailable, opt.Patience, reason)
	case ctx.Err() != nil:
		return waitError{missing, ctx.Err()}
	}
	return err
}

// outage ends a wait once the store has been unreachable for limit. Until its first answer the store counts as
// unreachable.
type outage struct {
	timer   *time.Timer // nil: it may last for ever
	limit   time.Duration
	running bool
}

func newOutage(limit time.Duration, end func()) *outage {
	o := &outage{limit: limit}
	if limit > 0 {
		o.timer, o.running = time.AfterFunc(limit, end), true
	}
	return o
}

func (o *outage) begin() {
	if o.timer != nil && !o.running {
		o.timer.Reset(o.limit)
		o.running = true
	}
}

func (o *outage) end() {
	if o.timer != nil {
		o.timer.Stop()
		o.running = false
	}
}

// CheckCommit returns an error unless a text can be a commit's hash, or the first seven or more digits of one.
func CheckCommit(commit string) error {
	if len(commit) < 7 || strings.Trim(strings.ToLower(commit), "0123456789abcdef") != "" {
		return fmt.Errorf("commit %q: want its hash, at least seven digits of it: in a clone, $(git rev-parse %s)",
			commit, commit)
	}
	return nil
}

// waitError is an error that says what was still missing.
type waitError struct {
	missing string
	err     error
}

func (e waitError) Error() string { return e.missing }
func (e waitError) Unwrap() error { return e.err }

// waiter is the state that Wait keeps from one fleet that it checks to the next.
type waiter struct {
	filter Filter
	commit string
	push   bool    // check only what the commit changed
	taken  bool    // the mirror has, or may have, taken commit or a later one
	head   *string // the mirror's head when it was first seen; nil: not seen yet
	outage *outage
	// sinceBeforeOrder has, for the nodes of each unit with a pending order, when they entered their states
	// (UnitReport.Since). As long as a node's Since is the same, its state says nothing about the order's effect.
	sinceBeforeOrder map[waitKey]time.Time
}

type waitKey struct {
	unit deployments.UnitID
	node string
}

// retryInterval is the time between two tries of a read that failed.
const retryInterval = 500 * time.Millisecond

// confirm reads the fleet anew, and returns the result of check or, in missing, why a part can't be read. It repeats a
// failed read after retryInterval, as perhaps no change of the store causes another check. If ctx ends, missing is the
// last read's error.
func (w *waiter) confirm(ctx context.Context, store kv.Store, filter Filter) (missing string, err error) {
	for {
		f, err := Read(ctx, store, filter)
		if err == nil {
			w.outage.end()
			// An unreadable part may hide a node that isn't converged, or a pin.
			if len(f.incomplete) > 0 {
				return f.IncompleteText(), nil
			}
			for _, kind := range []string{kv.DesiredPrefix, kv.PinsPrefix, kv.StatusPrefix} {
				if why := f.Errors[kind]; why != "" {
					return kind + ": " + why, nil
				}
			}
			return w.check(f)
		}
		w.outage.begin()
		select {
		case <-ctx.Done():
			return err.Error(), nil
		case <-time.After(retryInterval):
		}
	}
}

// check returns what f still lacks, empty if the wait is over, or an error if waiting longer can't help.
func (w *waiter) check(f *Fleet) (missing string, err error) {
	if missing, err := w.checkHead(f); missing != "" || err != nil {
		return missing, err
	}
	if len(f.Units) == 0 {
		if why := cmp.Or(f.Errors[kv.DesiredPrefix], f.Errors[kv.StatusPrefix]); why != "" {
			return why, nil
		}
		if len(f.incomplete) > 0 {
			return f.IncompleteText(), nil
		}
		switch {
		case w.commit == "" && !f.CommitTaken():
			return "the store knows no such unit, and no mirror has taken a commit yet" + f.refusal(), nil
		case w.commit == "":
			return "the store knows no such unit" + f.refusal(), nil // the unit may still come
		case w.filter == Filter{}:
			return "", nil // the commit is taken, and a repo without units has no nodes to wait for
		}
		return "", fmt.Errorf("the mirror has taken commit %s, and Git has no such unit: correct the name, or see "+
			"kedge status",
			short(w.commit))
	}
	units := f.Units
	if w.filter.Unit == "" { // waiting for a fleet doesn't include units that were removed from Git
		units = slices.DeleteFunc(slices.Clone(units),
			func(u Unit) bool { return u.orphaned() && u.Order == "" && !u.Pinned(f.At) })
	}
	if w.push {
		units = slices.DeleteFunc(slices.Clone(units), func(u Unit) bool { return w.unchangedByCommit(f, u) })
	}
	for _, u := range units {
		if err := w.checkHopeless(&u, f.At); err != nil {
			return "", err
		}
	}
	var all []string
	byMirror := false
	for _, u := range units {
		if s := lacking(&u, f.At); s != "" {
			all = append(all, s)
			byMirror = byMirror || rollout(&u, f.At) != nil || pendingPin(&u, f.At) != ""
		}
	}
	if byMirror && f.mirrorStopped() {
		all = append(all, "no mirror runs now")
	}
	if m := f.Mirror; m != nil && len(all) > 0 && m.Error != "" && m.Refused == "" {
		all = append(all, "the mirror says: "+message.OneLine(m.Error)) // the error may be the reason
	}
	return strings.Join(all, "; "), nil
}

// refusal returns a text to append to "no such unit". It says that the mirror refused the newest commit, which may have
// the unit. It is empty if the mirror refused none.
func (f *Fleet) refusal() string {
	if f.Mirror == nil || f.Mirror.Refused == "" {
		return ""
	}
	return fmt.Sprintf("; the mirror refused %s: %s", short(f.Mirror.Refused), message.OneLine(f.Mirror.Error))
}

// checkHead returns what is missing until the mirror has taken w.commit and written its records.
// missing is empty after that, or if there is no commit to wait for. It is an error if the mirror
// refused the commit.
func (w *waiter) checkHead(f *Fleet) (missing string, err error) {
	if w.commit == "" {
		return "", nil
	}
	var m deployments.MirrorState
	if f.Mirror != nil {
		m = *f.Mirror
	}
	if m.Applying != "" && strings.HasPrefix(m.Applying, w.commit) {
		return fmt.Sprintf("the mirror is about to write the records of commit %s", short(m.Applying)), nil
	}
	if w.taken {
		return "", nil
	}
	if w.head == nil && f.Errors[kv.MirrorPrefix] == "" {
		w.head = &m.Head
	}
	switch {
	case strings.HasPrefix(m.Head, w.commit), w.listedIn(m.Ancestors), w.skippedCommits(m):
		w.taken = true
		return "", nil
	case m.Refused != "" && strings.HasPrefix(m.Refused, w.commit):
		return "", fmt.Errorf("the mirror %w commit %s: %s", ErrRefused, short(m.Refused), m.Error)
	case f.Mirror == nil && cmp.Or(f.Errors[kv.MirrorPrefix], f.Errors[kv.MirrorKey]) != "":
		return "the mirror's state can't be read: " + cmp.Or(f.Errors[kv.MirrorPrefix], f.Errors[kv.MirrorKey]), nil
	case f.Mirror == nil:
		return "no mirror has taken any commit yet", nil
	}
	missing = "the mirror is still at " + cmp.Or(short(m.Head), "no commit")
	if m.Error != "" {
		missing += ": " + message.OneLine(m.Error)
	}
	if f.mirrorStopped() {
		missing += "; no mirror runs now"
	}
	return missing, nil
}

// unchangedByCommit reports whether u has no record, or one that was written for a commit before
// w.commit. It returns false if that is unknown, as when the mirror's Ancestors don't reach
// back that far.
func (w *waiter) unchangedByCommit(f *Fleet, u Unit) bool {
	if u.Record == nil {
		return true // a removed unit goes on as it is
	}
	if u.Record.Rollout.WaitsForRollback() {
		return false // the commit may name the release that waits
	}
	if f.Mirror == nil {
		return false
	}
	for _, name := range append([]string{f.Mirror.Head}, strings.Fields(f.Mirror.Ancestors)...) {
		if name != "" && strings.HasPrefix(u.Record.Commit, name) {
			return false // w.commit, or a later one
		}
		if strings.HasPrefix(name, w.commit) || name != "" && strings.HasPrefix(w.commit, name) {
			return true
		}
	}
	return false
}

// listedIn reports whether ancestors, which is MirrorState.Ancestors, lists w.commit. If so, the
// mirror's head descends from w.commit. The listed hashes and w.commit may be abbreviated.
func (w *waiter) listedIn(ancestors string) bool {
	return slices.ContainsFunc(strings.Fields(ancestors), func(name string) bool {
		return strings.HasPrefix(name, w.commit) || strings.HasPrefix(w.commit, name)
	})
}

// skippedCommits reports whether the mirror's head has changed since w first saw it, and the new
// Ancestors don't list that first head. The commits in between are then unknown, and may include
// w.commit. If Ancestors do list the first head, the commits in between are known, and w.commit may
// yet come.
func (w *waiter) skippedCommits(m deployments.MirrorState) bool {
	return w.head != nil && *w.head != "" && m.Head != *w.head && !strings.Contains(m.Ancestors, short(*w.head))
}

// checkHopeless returns an error that wraps ErrRefused if a node has refused what u should run, or if the rollout was
// rolled back and no pin is pending. Waiting longer doesn't help then. While u has a pending order, checkHopeless fills
// sinceBeforeOrder instead, and returns nil.
func (w *waiter) checkHopeless(u *Unit, now time.Time) error {
	if u.Order != "" {
		for _, n := range u.Nodes {
			w.sinceBeforeOrder[waitKey{u.ID, n.Name}] = n.Report.Since
		}
		return nil // the order is about to change the unit's state
	}
	for _, n := range u.Nodes {
		r := n.Report
		since, asked := w.sinceBeforeOrder[waitKey{u.ID, n.Name}]
		switch {
		case asked && r.Since.Equal(since):
			continue
		case n.Gone || n.Converged || n.Want.IsZero() || r.Want != n.Want:
			continue
		case !r.Pinned && u.Record != nil && r.Generation != u.Record.Generation:
			continue // the report is about another record, as from before a retry
		case r.State == deployments.StateQuarantined && slices.Contains(r.Quarantined, n.Want.Digest):
			return fmt.Errorf("%s: %s %w %s after it failed there: %s", u.ID, n.Name, ErrRefused, u.Release(n.Want),
				message.OneLine(r.Error))
		case r.State == deployments.StateInvalid:
			return fmt.Errorf("%s: %s %w %s: %s", u.ID, n.Name, ErrRefused, u.Release(n.Want), message.OneLine(r.Error))
		}
	}
	if p := rollout(u, now); p != nil && p.Phase == deployments.PhaseRolledBack && pendingPin(u, now) == "" {
		return fmt.Errorf("%s: %w %s: %s", u.ID, ErrRefused, u.Release(u.Record.Target), message.Rollout(p))
	}
	return nil
}

// rollout returns the rollout of u that Wait waits for; nil: none. It is nil for an orphaned unit, whose rollout waits
// for its file, and while nodes follow a pin by themselves.
func rollout(u *Unit, now time.Time) *deployments.Progress {
	if u.Record == nil || u.Pinned(now) && !policy.Paced(*u.Record, *u.Pin) || u.orphaned() {
		return nil
	}
	return u.Record.Rollout
}

// pendingPin returns a text if the mirror has yet to write a pin, or the end of a pin, into the record of u. Until then
// nodes follow a record that is about to change. Empty: nothing is pending.
func pendingPin(u *Unit, now time.Time) string {
	switch {
	case u.Record == nil || u.orphaned():
	case !u.Pinned(now) && u.Record.Pinned != nil:
		return "the mirror has yet to take the end of the pin"
	case u.Pinned(now) && policy.Paced(*u.Record, *u.Pin) && u.Record.Target != u.Pin.Release:
		return "the mirror has yet to take the pin to " + u.Release(u.Pin.Release)
	}
	return ""
}

// pendingPin returns the function's text for people; empty, too, if some pins could not be read.
func (f *Fleet) pendingPin(u *Unit) string {
	for key := range f.Errors {
		if strings.HasPrefix(key, kv.PinsPrefix) && strings.HasSuffix(key, "/") {
			return ""
		}
	}
	return pendingPin(u, f.At)
}

// lacking returns what keeps a unit from being converged; empty: nothing.
func lacking(u *Unit, now time.Time) string {
	if u.Error != "" {
		return fmt.Sprintf("%s: %s", u.ID, message.OneLine(u.Error))
	}
	if u.Order != "" {
		return fmt.Sprintf("%s: the mirror has yet to take the order to %s", u.ID, u.Order)
	}
	if s := pendingPin(u, now); s != "" {
		return fmt.Sprintf("%s: %s", u.ID, s)
	}
	for _, n := range u.Nodes {
		if n.Gone || n.Converged {
			continue
		}
		what := string(n.Report.State)
		switch {
		case what == "":
			what = n.Message
		case n.Report.State == deployments.StateConverged:
			what = "has yet to see what it should run"
		}
		if n.Report.Error != "" {
			what += " (" + message.OneLine(n.Report.Error) + ")"
		}
		return fmt.Sprintf("%s: %d of %d nodes converged, %s: %s", u.ID, u.Converged, u.Live, n.Name, what)
	}
	if u.Converged < u.Live {
		return fmt.Sprintf("%s: %d of %d nodes converged: the others aren't listed, see kedge status", u.ID,
			u.Converged, u.Live)
	}
	if p := rollout(u, now); p != nil && p.Phase != deployments.PhaseRolledBack {
		return fmt.Sprintf("%s: rollout: %s", u.ID, message.Progress(p))
	}
	return ""
}

func short(hash string) string { return safetext.Prefix(hash, 12) }
