package agent

import (
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments"
)

// Memory is freed once after a series of jobs, not between a fetch and its switch.
func TestMemoryIsFreedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var freed atomic.Int64
		a := &Agent{c: Config{FreeMemory: func() { freed.Add(1) }}}
		for range 3 {
			a.freeMemory()
			time.Sleep(freeDelay / 2)
		}
		if n := freed.Load(); n > 0 {
			t.Errorf("it is freed %d times between jobs", n)
		}
		time.Sleep(10 * freeDelay)
		if n := freed.Load(); n != 1 {
			t.Errorf("it is freed %d times after the last job", n)
		}
	})
}

func TestMemoryIsFreedAfterADeployment(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	var freed atomic.Int64
	a := w.start(func(c *Config) { c.FreeMemory = func() { freed.Add(1) } })
	a.awaitRunning(app, one)
	await(t, "memory is freed", func() (bool, string) {
		n := freed.Load()
		return n == 1, fmt.Sprintf("freed %d times", n)
	})
}
