//go:build race

package policy

const histories = 500
