package mirror

import (
	"log/slog"
	"time"
)

const (
	// leastStep is by how much the clock has to go forward at once to count as a step. Time servers that correct less
	// let it run faster for a while instead.
	leastStep = 5 * time.Second
	// longestWait bounds how long the mirror waits for a time at which something ends, as the clock may step meanwhile,
	// and the machine may have been suspended: Go's timers count neither.
	longestWait = time.Minute
)

// clockSteps notices when the machine's clock goes forward by more than the time that has passed. A record has the time
// at which a step of its rollout began. By the new clock, a node's deadline may be over before the node had its time.
type clockSteps struct {
	log  *slog.Logger
	at   time.Time // of the last call of last, with Go's monotonic reading
	wall time.Time // the same time by the machine's clock alone
	step time.Time // when a step was last noticed; zero: never
}

// last returns when the clock was last seen to have gone forward; zero: never. now is the present, with its monotonic
// reading.
func (c *clockSteps) last(now time.Time) time.Time {
	wall := now.Round(0)
	if !c.at.IsZero() {
		if step := wall.Sub(c.wall) - now.Sub(c.at); step > leastStep {
			c.step = now
			c.log.Warn("the machine's clock went forward: the deadlines of rollouts count from now", "by",
				step.Round(time.Millisecond))
		}
	}
	c.at, c.wall = now, wall
	return c.step
}
