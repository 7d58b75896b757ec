// Package drain knows which units of a node are drained, that is, taken out of service, and sets the node's maintenance
// mode accordingly.
package drain

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
)

const (
	// maxWait is how long a switch waits at most for maintenance mode to be on.
	maxWait = 5 * time.Second
	// maxRetry is the longest pause between two tries to set maintenance mode.
	maxRetry = 30 * time.Second
)

// Tracker knows which units are drained. Create it with New.
type Tracker struct {
	maintenance func(ctx context.Context, on bool, reason string) error
	idle        <-chan struct{} // once closed, a node that isn't drained is in service
	log         *slog.Logger
	changed     wait.Signal

	mu        sync.Mutex
	units     []deployments.UnitID
	on        bool          // maintenance mode as it was last set
	known     bool          // whether on was set in this run; an earlier run may have left the mode on
	uncertain bool          // on may be wrong: the mode is being set, or setting it failed, perhaps after it took effect
	done      chan struct{} // closed and replaced when the mode was set
}

// New returns a Tracker of a node without drained units. maintenance sets the node's maintenance mode; nil: the node
// has none. idle is closed once the node may leave a maintenance mode that an earlier run left on.
func New(
	maintenance func(ctx context.Context, on bool, reason string) error,
	idle <-chan struct{},
	log *slog.Logger,
) *Tracker {
	return &Tracker{
		maintenance: maintenance,
		idle:        idle,
		log:         log,
		changed:     wait.NewSignal(),
		done:        make(chan struct{}),
	}
}

// Set records that a unit is drained or no longer is. If on is set, and the node has a maintenance mode, it waits for
// the mode to be on, at most maxWait. It returns an error only if ctx ends meanwhile.
func (d *Tracker) Set(ctx context.Context, id deployments.UnitID, on bool) error {
	d.mu.Lock()
	d.units = slices.DeleteFunc(d.units, func(u deployments.UnitID) bool { return u == id })
	if on {
		d.units = append(d.units, id)
	}
	d.mu.Unlock()
	if d.maintenance == nil {
		return nil
	}
	d.changed.Set()
	if !on {
		return nil
	}
	timeout := time.NewTimer(maxWait)
	defer timeout.Stop()
	for {
		d.mu.Lock()
		applied, done := d.on && !d.uncertain, d.done
		d.mu.Unlock()
		if applied {
			return nil
		}
		select {
		case <-done:
		case <-timeout.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// End ends the drain of a unit without waiting.
func (d *Tracker) End(id deployments.UnitID) {
	if slices.Contains(d.Units(), id) {
		_ = d.Set(context.Background(), id, false)
	}
}

// Units returns the drained units.
func (d *Tracker) Units() []deployments.UnitID {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.units)
}

// Run keeps the node's maintenance mode on while a unit is drained, and off otherwise, until ctx ends.
// It returns at once if the node has no maintenance mode. If the agent stops while a unit is drained,
// the mode stays on: the next process ends it once idle is closed, unless a unit is drained again.
func (d *Tracker) Run(ctx context.Context) {
	if d.maintenance == nil {
		return
	}
	retry := wait.NewBackoff(250*time.Millisecond, maxRetry/2)
	for {
		d.mu.Lock()
		want, on, known, uncertain := len(d.units) > 0, d.on, d.known, d.uncertain
		var names []string
		for _, u := range d.units {
			names = append(names, u.String())
		}
		d.mu.Unlock()
		var again <-chan time.Time
		var idle <-chan struct{}
		if !known && !uncertain && !want { // a mode that an earlier run left on stays on until d.idle is closed
			select {
			case <-d.idle:
			default:
				idle = d.idle
			}
		}
		if idle == nil && (want != on || !known || uncertain) {
			d.mu.Lock()
			d.uncertain = true
			d.mu.Unlock()
			err := d.maintenance(ctx, want, "kedge has drained "+strings.Join(names, ", ")+": see kedge status")
			switch {
			case err == nil:
				retry.Reset()
				d.mu.Lock()
				d.on, d.known, d.uncertain = want, true, false
				close(d.done)
				d.done = make(chan struct{})
				d.mu.Unlock()
				continue
			case ctx.Err() != nil:
				return
			case retry.Tries() == 0:
				d.log.Warn("could not set this node's maintenance mode in Consul: trying again", "on", want, "units", names,
					"error", err)
			}
			again = time.After(retry.Next())
		}
		select {
		case <-ctx.Done():
			return
		case <-d.changed.C():
		case <-idle:
		case <-again:
		}
	}
}
