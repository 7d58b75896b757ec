package web

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
)

// chart shows a unit's releases over time, as areas in proportion to their live nodes.
type chart struct {
	Areas    []mapPath
	From, To time.Time
	// Changes is how many changes of the proportions it shows.
	Changes int
}

// chartWidth and chartHeight are the size of a chart's drawing, in SVG units.
const chartWidth, chartHeight = 1000, 100

// chartOf returns the chart of a unit's samples up to now. It rounds now down to the minute, so
// that the chart seldom changes by time alone. The chart is empty if there are fewer than two
// samples, or all are of the same time.
func chartOf(u *unit, samples []sample, now time.Time) chart {
	if len(samples) < 2 {
		return chart{}
	}
	c := chart{From: samples[0].at, To: now.Truncate(time.Minute), Changes: len(samples) - 1}
	if last := samples[len(samples)-1].at; c.To.Before(last) {
		c.To = last
	}
	span := c.To.Sub(c.From)
	if span <= 0 {
		return chart{}
	}
	x := func(t time.Time) int { return int(int64(t.Sub(c.From)) * chartWidth / int64(span)) }
	classes := []string{"v0", "v1", "v2", "v3", "v4", othersClass, "vn"}
	// Each area reaches down to the base line, so the highest is drawn first, and the lower ones over it.
	tops := make([]int, len(samples))
	for _, class := range classes {
		drawn := false
		for i, s := range samples {
			for d, n := range s.counts {
				if u.pastClass(d) == class {
					tops[i] += n
					drawn = true
				}
			}
		}
		if drawn {
			c.Areas = append(c.Areas, mapPath{class, area(samples, tops, x)})
		}
	}
	slices.Reverse(c.Areas)
	return c
}

// pastClass returns the class of a release that live nodes run or ran; vn for no release. A release
// that no live node runs any more has v0 if it is the target, and v1 if it is the stable release.
// If it was rolled back, it has v2 unless another release has that class. All others share
// othersClass.
func (u *unit) pastClass(d deployments.Digest) string {
	if class := u.classes[d]; class != "" {
		return class
	}
	switch {
	case d.IsZero():
		return "vn"
	case d == u.target.Digest:
		return "v0"
	case u.Record == nil:
	case d == u.Record.Stable.Digest:
		return "v1"
	case u.Record.Rollout != nil && d == u.Record.Rollout.Failed &&
		!slices.Contains(slices.Collect(maps.Values(u.classes)), "v2"):
		return "v2"
	}
	return othersClass
}

// area returns the SVG path of the area below a stepped line. tops has the line's height at each sample, in nodes, and
// x returns the coordinate of a time.
func area(samples []sample, tops []int, x func(time.Time) int) string {
	var b strings.Builder
	y := func(i int) int {
		total := 0
		for _, c := range samples[i].counts {
			total += c
		}
		return chartHeight - tops[i]*chartHeight/max(1, total)
	}
	before := y(0)
	fmt.Fprintf(&b, "M0 %d", before)
	for i := 1; i < len(samples); i++ {
		if at := y(i); at != before {
			fmt.Fprintf(&b, "H%dV%d", x(samples[i].at), at)
			before = at
		}
	}
	fmt.Fprintf(&b, "H%dV%dH0Z", chartWidth, chartHeight)
	return b.String()
}
