package agent

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// Status returns what /status shows: the agent's reports, sources and decisions, what its units
// wait for, and why it isn't ready.
func (a *Agent) Status() policy.NodeStatus {
	roles := a.Report()
	a.mu.Lock()
	defer a.mu.Unlock()
	s := policy.NodeStatus{
		Node: a.c.Node, Stage: a.c.Stage, Agent: a.c.Version, Started: a.started.UTC(), Roles: roles,
		Decisions: map[string]policy.DecisionStatus{}, Messages: a.unready(),
	}
	s.Ready = len(s.Messages) == 0
	for _, r := range a.cache.Roles() {
		for _, src := range r.Sources() {
			st := policy.SourceStatus{Prefix: src.Prefix}
			st.From, st.Since = src.Origin()
			if since, err := src.Error(); err != nil {
				st.Error, st.ErrorSince = oneLine(err), since
			}
			s.Sources = append(s.Sources, st)
		}
	}
	for id, u := range a.units {
		if !u.decided || u.gone() {
			continue
		}
		d := u.decision
		s.Decisions[id.Role+"/"+id.Unit] = policy.DecisionStatus{
			Action: d.Action, Target: d.Target, Stage: d.Stage, Source: d.Source, Reason: d.Reason, Facts: d.Facts,
			Message: message.Decision(d.Reason, d.Facts), Invalid: errorText(d.Invalid),
			Recheck: d.Recheck, WaitsFor: u.blocked.why, Trace: message.Trace(id, a.c.Node, d.Trace),
		}
	}
	return s
}

// Report returns the agent's present reports, by role, within their limits: see fitReport.
func (a *Agent) Report() map[string]deployments.Report {
	a.mu.Lock()
	defer a.mu.Unlock()
	reports := map[string]deployments.Report{}
	ready := len(a.unready()) == 0
	for _, r := range a.cache.Roles() {
		reports[r.Name] = deployments.Report{
			Node:    a.c.Node,
			Joined:  a.joined[r.Name],
			Agent:   a.c.Version,
			Started: a.startingSince.UTC(),
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

// report returns the unit's part of the node's report.
func (u *unit) report() deployments.UnitReport {
	s, now := u.state(), u.stamp(time.Now()) // what the journal says may have changed since the last stamp
	if unhealthy := u.healthError(); unhealthy != nil && now.reason == "" {
		now.reason, now.facts, now.err = u.health.Reason, u.health.Facts, unhealthy // for example, a held unit
	}
	if held := u.heldGeneration; held > 0 && now.reason == "" {
		now.reason = deployments.ReasonOldGeneration
		now.facts = deployments.Facts{"generation": fmt.Sprint(held), "acted_on": fmt.Sprint(u.actedOn)}
		now.err = fmt.Errorf(
			"the record has generation %d, and this node has acted on %d: it waits for a mirror that knows the newer one",
			held,
			u.actedOn,
		)
	}
	r := deployments.UnitReport{
		State: now.state, Reason: now.reason, Facts: now.facts, Running: s.Running, Version: safetext.Cut(s.Version, 128),
		Want: u.decision.Target, Message: safetext.Cut(message.Decision(u.decision.Reason, u.decision.Facts), 300),
		Generation: max(u.record.Value.Generation, u.actedOn), Staged: s.Staged.Digest, Quarantined: s.Quarantined,
		RollingBack: s.RollingBack, Leavable: s.Leavable, Pinned: u.decision.Source == policy.FromNodePin ||
			u.decision.Source == policy.FromUnitPin,
		Errors: u.errors.newest(),
		Since:  u.since.UTC().Truncate(time.Millisecond), Drift: u.drift,
	}
	r.OtherServes = s.Running.IsZero() &&
		(u.contends || u.inspected.found == policy.FoundOther ||
			u.inspected.found == policy.FoundUnknown && !s.Restored.IsZero())
	if r.Compared = s.Compared; u.observes {
		r.Compared = u.comparison
	}
	if now.reason == deployments.ReasonDependency {
		r.Message = u.blocked.why
	}
	if want := u.decision.Target; s.Unfinished && want.Digest != s.Running.Digest && u.staysQuarantined(want) {
		r.Failed = want.Digest
	}
	if now.err != nil {
		r.Error = oneLine(now.err)
	}
	if now.state == deployments.StateFetching {
		r.Fetched, r.Total = u.progress.Done, u.progress.Total
	}
	return r
}

// maxUnitsSize bounds the size of a report's units, in bytes.
const maxUnitsSize = deployments.MaxReport - 8<<10

// fitReport reduces a report to the limits of its size and of its units, and returns how many units it dropped. It
// first drops details of units, then units, each from the last name to the first. Units in mid-switch go last, because
// their switch waits for the store to hold the report.
func fitReport(r *deployments.Report) (left int) {
	size := func(name string) int {
		data, err := json.Marshal(r.Units[name])
		if err != nil {
			panic("a report has no JSON") // it is plain data
		}
		return len(data) + len(name) + len(`"":,`)
	}
	names, total, sizes := slices.Sorted(maps.Keys(r.Units)), 0, map[string]int{}
	slices.SortStableFunc(names, func(a, b string) int {
		return cmp.Compare(switchRank(r.Units[a]), switchRank(r.Units[b]))
	})
	for _, name := range names {
		sizes[name] = size(name)
		total += sizes[name]
	}
	for i := len(names) - 1; i >= 0 && total > maxUnitsSize; i-- {
		u := r.Units[names[i]]
		u.Drift, u.Errors, u.Facts, u.Message = nil, nil, nil, ""
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

// switchRank returns 0 for a unit in mid-switch, 1 for any other.
func switchRank(u deployments.UnitReport) int {
	if u.State == deployments.StateSwitching {
		return 0
	}
	return 1
}

// storeUp returns, for each watched prefix, whether the agent's view of it is up to date. It leaves out prefixes for
// which the store hasn't answered yet.
func (a *Agent) storeUp() map[string]bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	up := map[string]bool{}
	for _, r := range a.cache.Roles() {
		for _, s := range r.Sources() {
			if s.Answered() {
				_, err := s.Error()
				up[s.Prefix] = err == nil
			}
		}
	}
	return up
}

// knowsRole reports whether the agent knows enough of a role to report on it. It must know the
// role's records and pins, or that the store lacks the role's folder. It must also have a decision
// and the state of each unit. A unit whose state can't be opened counts as known.
func (a *Agent) knowsRole(role string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.cache.Roles() {
		if r.Name == role && !r.Known() && !r.Missing() { // a node with a mistyped role must be found in the reports
			return false
		}
	}
	for id, u := range a.units {
		if id.Role == role && (!u.decided || u.deploy == nil && u.lastErr == nil) {
			return false
		}
	}
	return true
}
