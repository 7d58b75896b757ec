package agent

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"kedge/deployments"
	"kedge/kv"
)

// beginAnnounced lets the switches begin that are announced by w, the report of role that the store
// holds.
func (a *Agent) beginAnnounced(role string, w writtenReport) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, said := range w.units {
		u := a.units[deployments.UnitID{Stage: a.c.Stage, Role: role, Unit: name}]
		if u != nil && u.announce != nil && said.State == deployments.StateSwitching && said.Want == u.announce.release {
			closeOnce(u.announce.made)
		}
	}
}

// announces reports whether a switch of a role's units waits for the store to hold a report.
func (a *Agent) announces(role string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, u := range a.units {
		if id.Role == role && !u.announce.begins() {
			return true
		}
	}
	return false
}

const (
	// progressEvery is the time between two reports that differ only in bytes fetched or in steps of a switch.
	progressEvery = 3 * time.Second
	// switchWithin is how long a node delays a report that only says that it fetches a new release. Until it switches,
	// nothing is out of service. Most switches begin sooner, and one report then says both.
	switchWithin = time.Second
	// reportsPerSecond and reportBurst bound all reports but those that a switch waits for.
	reportsPerSecond = 4
	reportBurst      = 16
	leaveWithin      = 5 * time.Second // for removing the reports at the end
)

// report writes the reports to the store whenever they change, until ctx ends. Then it removes them, as a node that
// stops in order isn't a dead one. It leaves the reports of roles with a unit in mid-switch. report can't tell whether
// the node stops for good, as in a scale-in, because a restart of the agent ends ctx by the same signal. So the mirror
// counts a node whose reports were removed in the budget for two more minutes (unlisted in package policy). Otherwise a
// rollout would end without nodes that restart.
func (a *Agent) report(ctx context.Context) {
	presence := a.openPresence(ctx)
	if presence == nil {
		return
	}
	var joined sync.WaitGroup
	defer func() {
		joined.Wait()
		a.workers.Wait() // what they still finish isn't reported
		for _, role := range a.rolesInMidSwitch() {
			presence.KeepAtClose(kv.StatusKey(a.c.Stage, role, a.c.Node))
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveWithin)
		defer cancel()
		if err := presence.Close(ctx); err != nil {
			a.c.Log.Warn("could not remove this node's status: kedge status shows the node until its session ends", "error", err)
		}
	}()
	written := map[string]writtenReport{}
	limit := rate.NewLimiter(reportsPerSecond, reportBurst)
	retry, failed := newBackoff(), false
	for {
		if failed && retry.Wait(ctx) != nil {
			return
		}
		var again time.Duration // until a delayed report may be written; 0: none is delayed
		later := func(d time.Duration) {
			if again == 0 || d < again {
				again = d
			}
		}
		for role, r := range a.Report() {
			if !a.knowsRole(role) {
				continue // a report in the first moments would only replace a better one
			}
			next := a.encode(role, r)
			last := written[role]
			a.beginAnnounced(role, last)
			joins := r.Joined == 0
			if next.news == last.news && !joins {
				continue
			}
			if next.coarse == last.coarse && !joins {
				if wait := progressEvery - time.Since(last.at); wait > 0 {
					later(wait)
					continue
				}
			}
			if wait := reportDelay(last.units, r.Units, time.Now()); wait > 0 {
				later(wait)
				continue
			}
			// Don't wait with this report in hand: it would be old by then, and the newest would have to wait
			// again. Reports that a switch waits for are no more frequent than switches.
			if !limit.Allow() && !a.announces(role) {
				later(time.Second / reportsPerSecond)
				continue
			}
			key := kv.StatusKey(a.c.Stage, role, a.c.Node)
			var err error
			if joins {
				err = a.join(ctx, &joined, presence, role, key, next.data)
			} else {
				err = presence.Put(ctx, key, next.data)
			}
			if err != nil {
				if ctx.Err() != nil {
					return
				}
				if retry.Tries() == 0 {
					a.c.Log.Warn("could not write the node's status: trying again", "role", role, "error", err)
				}
				failed = true
				a.reportDue.Set()
				break
			}
			retry.Reset()
			failed = false
			a.metrics.wroteReport()
			next.at = time.Now()
			written[role] = next
			a.beginAnnounced(role, next)
		}
		var due <-chan time.Time
		if again > 0 {
			due = time.After(again)
		}
		select {
		case <-ctx.Done():
			return
		case <-a.reportDue.C():
		case <-due:
		}
	}
}

// join writes a role's first report of a presence, and records the number that the store gives the report. A goroutine
// in joined sets that number to 0 when the presence is lost. A record admits the nodes up to a number that the mirror
// knows. A node with an older number than its report's might be admitted in addition to another node, without being
// counted.
func (a *Agent) join(
	ctx context.Context,
	joined *sync.WaitGroup,
	presence kv.Presence,
	role, key string,
	report []byte,
) error {
	since, lost, err := presence.Join(ctx, key, report)
	if err != nil {
		return err
	}
	a.setJoined(role, since)
	joined.Go(func() {
		select {
		case <-ctx.Done():
		case <-lost:
			a.setJoined(role, 0)
		}
	})
	return nil
}

// setJoined records the number of a role's report, as Presence.Join returned it; 0: the report has to join again.
func (a *Agent) setJoined(role string, since uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.joined == nil {
		a.joined = map[string]uint64{}
	}
	a.joined[role] = since
	a.changed.Set()
	a.reportDue.Set()
}

// rolesInMidSwitch returns the roles with a unit whose deployment is half done. Their reports stay when the agent
// ends, as the node is expected back.
func (a *Agent) rolesInMidSwitch() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var roles []string
	for id, u := range a.units {
		if u.state().Unfinished && !slices.Contains(roles, id.Role) {
			roles = append(roles, id.Role)
		}
	}
	return roles
}

// writtenReport is an encoded report, with the parts whose change is a reason to write it.
type writtenReport struct {
	data   []byte
	news   string // a report is written if this changed
	coarse string // a report doesn't wait for progressEvery if this changed
	units  map[string]deployments.UnitReport
	at     time.Time
}

// encode encodes a role's report. Its news leaves out what alone is no reason to write the report: error lines and, of
// a converged unit that the mirror doesn't wait for, the generation, the message and the staged release. The next
// report that is written has them all.
func (a *Agent) encode(role string, r deployments.Report) writtenReport {
	w := writtenReport{data: encoded(r), units: maps.Clone(r.Units)}
	for name, u := range r.Units {
		u.Errors = nil
		r.Units[name] = u
		if u.State == deployments.StateConverged && !a.awaited(deployments.UnitID{Stage: a.c.Stage, Role: role, Unit: name}) {
			u.Generation, u.Message, u.Staged = 0, "", deployments.Digest{}
			r.Units[name] = u
		}
	}
	w.news = string(encoded(r))
	for name, u := range r.Units {
		u.Fetched, u.Total = 0, 0
		if u.State == deployments.StateSwitching { // another state soon follows the last of its steps
			u.Running, u.Version, r.Ready = deployments.Pointer{}, "", false
		}
		r.Units[name] = u
	}
	w.coarse = string(encoded(r))
	return w
}

func encoded(r deployments.Report) []byte {
	data, err := json.Marshal(r)
	if err != nil {
		panic("a report has no JSON") // it is plain data
	}
	return data
}

// awaited reports whether the mirror waits for this node to report that it knows the unit's record. It does while a
// rollout has superseded others, as a record of one of those may have admitted the node.
func (a *Agent) awaited(id deployments.UnitID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	u := a.units[id]
	return u != nil && u.record.Value.Rollout != nil && len(u.record.Value.Rollout.Superseded) > 0
}

// reportDelay returns how much longer a report may be delayed because units have begun to fetch a release. Most units
// begin to switch soon after, and one report can say both. It returns 0 if no unit has begun, once switchWithin is
// over, or if another unit came, went, or changed its state, release or error.
func reportDelay(last, now map[string]deployments.UnitReport, at time.Time) (wait time.Duration) {
	if len(last) != len(now) {
		return 0
	}
	for name, u := range now {
		was, known := last[name]
		starts := known && was.State == deployments.StateConverged && u.State == deployments.StateFetching &&
			u.Error == "" && !u.Want.IsZero()
		switch {
		case starts:
			wait = max(wait, switchWithin-at.Sub(u.Since))
		case !known || was.State != u.State || was.Running != u.Running || was.Error != u.Error:
			return 0
		}
	}
	return max(wait, 0)
}

// openPresence opens the presence that holds the reports, and retries until it succeeds; nil if ctx ends.
func (a *Agent) openPresence(ctx context.Context) kv.Presence {
	retry := newBackoff()
	for {
		p, err := a.c.Store.Presence(ctx, a.c.Node)
		if err == nil {
			return p
		}
		if ctx.Err() != nil {
			return nil
		}
		if retry.Tries() == 0 {
			a.c.Log.Warn("could not write the node's status: trying again", "error", err)
		}
		if retry.Wait(ctx) != nil {
			return nil
		}
	}
}
