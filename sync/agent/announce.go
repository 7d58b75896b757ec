package agent

import (
	"context"
	"time"

	"kedge/deployments"
	"kedge/policy"
)

// announcement is a switch that begins once the store holds a report that says so.
type announcement struct {
	release deployments.Pointer
	made    chan struct{} // closed when it does
}

// begins reports whether what is announced, if anything is, may begin.
func (x *announcement) begins() bool {
	if x == nil {
		return true
	}
	select {
	case <-x.made:
		return true
	default:
		return false
	}
}

// announce waits until the store holds that a unit is in mid-switch, where a rollout's budget counts it: of a node that
// dies in its first steps the mirror would not know else that it is out of service, and would give its place away.
// While the store is away it begins nothing, and stays in service.
func (a *Agent) announce(ctx context.Context, u *unit, release deployments.Pointer) error {
	a.mu.Lock()
	serves := !u.state().Running.IsZero() || u.looked.found == policy.FoundOther
	pinned := u.decision.Source == policy.FromNodePin || u.decision.Source == policy.FromUnitPin
	// What is half done is out of service already, and its report says that: a way back that doesn't hold is unhealthy.
	if u.record.Value.Rollout == nil || pinned || !serves || u.state().Unfinished {
		a.mu.Unlock()
		return nil
	}
	made := make(chan struct{})
	u.announce = &announcement{release, made}
	u.phase = deployments.StateSwitching
	u.stamp(time.Now())
	a.mu.Unlock()
	a.kickReport()
	select {
	case <-made:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// announced lets begin the switches that the report in the store announces.
func (a *Agent) announced(role string, w writtenReport) {
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
