package web

import (
	"maps"
	"slices"
	"sync"
	"time"

	"kedge/deployments"
)

// trends record how many live nodes of each unit ran each release since the dashboard was started: the store has only
// the current state.
type trends struct {
	mu    sync.Mutex
	units map[deployments.UnitID][]sample
}

// sample is the number of live nodes that ran each release at one time. Nodes that ran nothing count under the zero
// digest, those that ran a release without a colour of its own under othersDigest.
type sample struct {
	at     time.Time
	counts map[deployments.Digest]int
}

// othersDigest is no release's digest. A sample counts the releases without a colour of their own under it.
var othersDigest = deployments.Digest{1}

const (
	// maxSamples bounds the samples of a unit. Beyond that every other sample is dropped, so that the chart grows coarser,
	// not longer.
	maxSamples = 60
	// maxTrends bounds the units that have a trend.
	maxTrends = 2000
	// sampleEvery bounds how often a unit gets a new sample. While the last sample but one is younger than this, a change
	// only updates the last one.
	sampleEvery = 2 * time.Second
)

// record adds a sample for each unit whose shares changed, or updates the unit's last sample: see
// sampleEvery. It forgets units that no longer exist.
func (t *trends) record(units []*unit, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	exists := make(map[deployments.UnitID]bool, len(units))
	for _, u := range units {
		exists[u.ID] = true
	}
	maps.DeleteFunc(t.units, func(id deployments.UnitID, _ []sample) bool { return !exists[id] })

	for _, u := range units {
		known := t.units[u.ID]
		if known == nil && len(t.units) >= maxTrends {
			continue
		}
		counts := map[deployments.Digest]int{}
		for _, s := range u.shares {
			d := s.Release.Digest
			if s.Class == othersClass {
				d = othersDigest
			}
			counts[d] += s.Count
		}
		last := len(known) - 1
		switch {
		case last >= 0 && maps.Equal(known[last].counts, counts):
			continue
		case last >= 1 && now.Sub(known[last-1].at) < sampleEvery:
			known[last] = sample{known[last].at, counts}
		default:
			known = append(known, sample{now, counts})
		}
		if len(known) > maxSamples {
			half := known[:0]
			for i, s := range known {
				if i%2 == 0 || i == len(known)-1 {
					half = append(half, s)
				}
			}
			known = half
		}
		t.units[u.ID] = known
	}
}

// of returns a unit's samples, oldest first.
func (t *trends) of(id deployments.UnitID) []sample {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.units[id])
}

// minTrend is how long nodes must have been changing before their pace is used for an estimate.
const minTrend = 15 * time.Second

// estimateEnd estimates when the release will run on the wanted number of nodes, by its pace in
// samples. It returns the zero time if there is no estimate.
func estimateEnd(samples []sample, release deployments.Digest, wanted int) time.Time {
	if len(samples) < 3 {
		return time.Time{}
	}
	last := samples[len(samples)-1]
	first := len(samples) - 1
	for first > 0 && samples[first-1].counts[release] <= samples[first].counts[release] {
		first--
	}
	for first < len(samples)-1 && samples[first+1].counts[release] == samples[first].counts[release] {
		first++ // the pace counts from when the first node changed
	}
	moved, took := last.counts[release]-samples[first].counts[release], last.at.Sub(samples[first].at)
	missing := wanted - last.counts[release]
	if moved <= 0 || missing <= 0 || took < minTrend {
		return time.Time{}
	}
	return last.at.Add(time.Duration(float64(took) / float64(moved) * float64(missing)))
}
