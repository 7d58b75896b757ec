package web

import (
	"fmt"
	"strings"

	"kedge/deployments"
	"kedge/sync/fleet"
)

// nodeMap draws each node of a unit, at most maxCells, as a cell. They are sorted by name.
type nodeMap struct {
	ID      deployments.UnitID
	Columns int
	Rows    []mapRow
	Healths []counted
	Shares  []share
	// LeftOut is how many nodes are left out.
	LeftOut int
}

// mapRow is one row of a nodeMap, drawn as SVG paths: each path has the cells of one class.
type mapRow struct {
	Key      string
	Columns  int
	Health   []mapPath
	Versions []mapPath
}

// mapPath is an SVG path in the colour of its class: cells of a map's row, or an area of a chart.
type mapPath struct{ Class, Path string }

// maxCells bounds the cells of a map.
const maxCells = 20_000

// mapOf returns the map of a unit's nodes.
func mapOf(u *unit) nodeMap {
	n := len(u.Nodes)
	m := nodeMap{ID: u.ID, Columns: columnsOf(n), LeftOut: max(0, n-maxCells), Shares: u.shares}
	for h, count := range u.healths {
		if count > 0 {
			m.Healths = append(m.Healths, counted{health(h).String(), count})
		}
	}
	nodes := u.Nodes[:min(n, maxCells)]
	for y := 0; len(nodes) > 0; y++ {
		line := nodes[:min(m.Columns, len(nodes))]
		nodes = nodes[len(line):]
		m.Rows = append(m.Rows, mapRow{
			Key: fmt.Sprintf("m:%d", y), Columns: m.Columns,
			Health:   paths(line, func(n *fleet.Node) string { return healthOf(n).String() }),
			Versions: paths(line, u.class),
		})
	}
	return m
}

// columnsOf returns how many cells a line has in a map of n nodes.
func columnsOf(n int) int {
	for _, columns := range []int{25, 50, 75, 100, 125} {
		if n <= columns*columns/5 {
			return columns
		}
	}
	return 200
}

// paths returns the cells of a line as one path per colour.
func paths(line []fleet.Node, class func(*fleet.Node) string) (all []mapPath) {
	byClass := map[string]*strings.Builder{}
	var order []string
	for x := 0; x < len(line); {
		c := class(&line[x])
		from := x
		for x < len(line) && class(&line[x]) == c {
			x++
		}
		b := byClass[c]
		if b == nil {
			b = &strings.Builder{}
			byClass[c] = b
			order = append(order, c)
		}
		fmt.Fprintf(b, "M%d .5h%d", from, x-from)
	}
	for _, c := range order {
		all = append(all, mapPath{c, byClass[c].String()})
	}
	return all
}

// describe returns a map in words, for readers who can't see it.
func (m nodeMap) describe() string {
	var parts []string
	for _, h := range m.Healths {
		parts = append(parts, fmt.Sprintf("%d %s", h.Count, healthLabel(h.Name)))
	}
	for _, s := range m.Shares {
		parts = append(parts, fmt.Sprintf("%d %s %s", s.Count, agree(s.Count, "runs", "run"), s.Name))
	}
	if len(parts) == 0 {
		return "no node has reported"
	}
	return "Nodes: " + strings.Join(parts, ", ")
}

// healthLabel returns the label of the health with a class; for any other class, the class itself.
func healthLabel(class string) string {
	for h := range healths {
		if h.String() == class {
			return h.Label()
		}
	}
	return class
}
