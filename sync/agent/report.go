package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"kedge/deployments"
	"kedge/kv"
)

const (
	// progressEvery is the time between two reports that differ in bytes fetched alone.
	progressEvery = 3 * time.Second
	// reportsPerSecond and reportBurst bound all reports.
	reportsPerSecond = 4
	reportBurst      = 16
	leaveWithin      = 5 * time.Second
)

// Report returns what the agent says of itself now, a report for each role.
func (a *Agent) Report() map[string]deployments.Report {
	a.mu.Lock()
	defer a.mu.Unlock()
	reports := map[string]deployments.Report{}
	ready := len(a.unready()) == 0
	for _, r := range a.cache.Roles() {
		reports[r.Name] = deployments.Report{
			Node:    a.c.Node,
			Joined:  a.joined,
			Agent:   a.c.Version,
			Started: a.begun.UTC(),
			Ready:   ready,
			Units:   map[string]deployments.UnitReport{},
		}
	}
	for id, u := range a.units {
		if !u.gone() {
			reports[id.Role].Units[id.Unit] = u.report()
		}
	}
	for _, r := range a.cache.Roles() {
		report := reports[r.Name]
		if left := r.LeftOut + fitReport(&report); left > 0 {
			report.Reason = deployments.ReasonTooManyUnits
			report.Facts = deployments.Facts{"limit": fmt.Sprint(deployments.MaxRoleUnits), "left_out": fmt.Sprint(left)}
		}
		reports[r.Name] = report
	}
	return reports
}

// maxUnitsSize bounds what the units of a report take of deployments.MaxReport, in bytes.
const maxUnitsSize = deployments.MaxReport - 8<<10

// fitReport makes a report no larger than it may be: details go first, then units, the last by name. It returns how
// many units it left out.
func fitReport(r *deployments.Report) (left int) {
	size := func(name string) int {
		data, err := json.Marshal(r.Units[name])
		if err != nil {
			panic("a report has no JSON") // it is plain data
		}
		return len(data) + len(name) + len(`"":,`)
	}
	names, total, sizes := slices.Sorted(maps.Keys(r.Units)), 0, map[string]int{}
	for _, name := range names {
		sizes[name] = size(name)
		total += sizes[name]
	}
	for i := len(names) - 1; i >= 0 && total > maxUnitsSize; i-- {
		u := r.Units[names[i]]
		u.Drift, u.Facts, u.Why = nil, nil, ""
		r.Units[names[i]] = u
		was := sizes[names[i]]
		sizes[names[i]] = size(names[i])
		total -= was - sizes[names[i]]
	}
	for i := len(names) - 1; i >= 0 && (total > maxUnitsSize || i >= deployments.MaxRoleUnits); i-- {
		delete(r.Units, names[i])
		total -= sizes[names[i]]
		left++
	}
	return left
}

// report writes the reports into the store whenever they change, until ctx ends; then it takes them back: a node
// that leaves in good order isn't a dead one.
func (a *Agent) report(ctx context.Context) {
	presence := a.presence(ctx)
	if presence == nil {
		return
	}
	var joining sync.WaitGroup
	joining.Go(func() { a.followJoined(ctx, presence) })
	defer func() {
		joining.Wait()
		a.workers.Wait() // what they can still end needs no word
		for _, role := range a.rolesInMidSwitch() {
			presence.Leave(kv.StatusKey(a.c.Stage, role, a.c.Node))
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveWithin)
		defer cancel()
		if err := presence.Close(ctx); err != nil {
			a.c.Log.Warn("the node's status could not be taken back", "error", err)
		}
	}()
	written := map[string]writtenReport{}
	limit := rate.NewLimiter(reportsPerSecond, reportBurst)
	retry, failed := newBackoff(), false
	for {
		if failed && retry.Wait(ctx) != nil {
			return
		}
		var again time.Duration // until one of the reports that had to wait may be written; 0: none had to
		later := func(d time.Duration) {
			if again == 0 || d < again {
				again = d
			}
		}
		for role, r := range a.Report() {
			if !a.settledIn(role) {
				continue // what a node says in its first moments would only hide what it said before
			}
			data, coarse := encodeReport(r)
			last := written[role]
			if data == last.data {
				continue
			}
			if coarse == last.coarse {
				if wait := progressEvery - time.Since(last.at); wait > 0 {
					later(wait)
					continue
				}
			}
			if !limit.Allow() { // no waiting with this one in hand: by then it is old, and the newest would wait for another turn
				later(time.Second / reportsPerSecond)
				continue
			}
			if err := presence.Put(ctx, kv.StatusKey(a.c.Stage, role, a.c.Node), []byte(data)); err != nil {
				if ctx.Err() != nil {
					return
				}
				if retry.Tries() == 0 {
					a.c.Log.Warn("the node's status can't be written: trying again", "role", role, "error", err)
				}
				failed = true
				a.kickReport()
				break
			}
			retry.Reset()
			failed = false
			a.metrics.reported()
			written[role] = writtenReport{data, coarse, time.Now()}
		}
		var due <-chan time.Time
		if again > 0 {
			due = time.After(again)
		}
		select {
		case <-ctx.Done():
			return
		case <-a.reportNow.C():
		case <-due:
		}
	}
}

// followJoined keeps the number of the node's presence, until ctx ends. While it isn't known, no rollout has told
// the node anything.
func (a *Agent) followJoined(ctx context.Context, presence kv.Presence) {
	retry := newBackoff()
	for ctx.Err() == nil {
		joined, changed, err := presence.Joined(ctx)
		if err != nil {
			if retry.Wait(ctx) != nil {
				return
			}
			continue
		}
		retry.Reset()
		a.setJoined(joined)
		select {
		case <-ctx.Done():
			return
		case <-changed:
			a.setJoined(0)
		}
	}
}

func (a *Agent) setJoined(joined uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.joined = joined
	a.kick()
}

// rolesInMidSwitch are the roles with a unit whose deployment is half done: their reports stay when the agent ends,
// as those of a node that comes back.
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

type writtenReport struct {
	data, coarse string
	at           time.Time
}

// encodeReport gives a report's JSON, and what of it makes a report worth writing at once.
func encodeReport(r deployments.Report) (data, coarse string) {
	full, err := json.Marshal(r)
	for name, u := range r.Units {
		u.Fetched, u.Total = 0, 0
		r.Units[name] = u
	}
	rest, err2 := json.Marshal(r)
	if err != nil || err2 != nil {
		panic("a report has no JSON") // it is plain data
	}
	return string(full), string(rest)
}

// settledIn reports whether the agent knows enough of a role to speak of it.
func (a *Agent) settledIn(role string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.cache.Roles() {
		if r.Name == role && !r.Known() && !r.Missing() { // who looks for a node with a mistyped role has to find it
			return false
		}
	}
	for id, u := range a.units {
		if id.Role == role && (!u.decided || u.deploy == nil && u.trouble == nil) {
			return false
		}
	}
	return true
}

// presence ties the reports to this node, as often as it takes; nil when ctx ends.
func (a *Agent) presence(ctx context.Context) kv.Presence {
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
			a.c.Log.Warn("the node's status can't be written: trying again", "error", err)
		}
		if retry.Wait(ctx) != nil {
			return nil
		}
	}
}
