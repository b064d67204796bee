#!/bin/sh
# hypersync runs this as: notify.sh EVENT MEMBER
#
# For two gateways without VRRP: the routers on either side have a route through one of the gateways, and
# this script moves both routes to this one when the other is dead or about to leave. The rules and settings are
# those of ../keepalived.

# This gateway, as its neighbours see it, and the other one.
inside=10.1.0.3 outside=203.0.113.3
other_inside=10.1.0.2 other_outside=203.0.113.2

inside_router() { ssh root@inside-router "$@"; }
outside_router() { ssh root@outside-router "$@"; }

answers() { ping -q -c 2 -i 0.2 -W 0.5 "$1" >/dev/null 2>&1; }

move_here() {
    inside_router ip route replace default via "$inside" &&
        outside_router ip route replace 203.0.113.1/32 via "$outside" &&
        logger -p daemon.crit -t hypersync "$1: the routes lead here now"
}

case $1 in
member-leaving | member-left)
    # It was told to end, perhaps because its host is shut down. It waits until nothing begins there.
    move_here "$1 $2"
    ;;
member-dead)
    # Nothing is heard on the sync link: that may be the link's fault, or the appliance's alone, while
    # the gateway forwards as ever. Then the routes stay.
    if answers "$other_inside" && answers "$other_outside"; then
        logger -p daemon.crit -t hypersync "$1 $2, but gateway $2 answers: the routes stay where they are"
    else
        move_here "$1 $2"
    fi
    ;;
esac
