//go:build !race

package mirror

const fleetSize = 500
