//go:build race

package mirror

const (
	fleetSize = 100 // what the race detector does to 500 agents takes minutes
	manyUnits = 2000
)
