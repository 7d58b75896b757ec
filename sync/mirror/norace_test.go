//go:build !race

package mirror

const (
	fleetSize = 500
	manyUnits = 20_000
)
